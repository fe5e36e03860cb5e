"""`pipefleet top`: the fleet at a glance, in a terminal. Reads Redis alone; needs no torch and no scaler."""
