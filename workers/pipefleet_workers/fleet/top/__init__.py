"""`pipefleet top`: the fleet at a glance, in a terminal. It reads only Redis; it needs no torch and no scaler.

`command` reads its options and repeats, `read` takes a snapshot of the fleet, `view` turns a snapshot into tables.
"""
