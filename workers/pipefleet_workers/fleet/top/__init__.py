"""`pipefleet top`: the fleet at a glance, in a terminal. It reads only Redis; it needs no torch and no scaler."""
