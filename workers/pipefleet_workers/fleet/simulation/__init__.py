"""`pipefleet simulate`: fleets of 1 to 10,000 devices over a day, in seconds of computing, to compare ways of scaling.

`run` compares the `policies` on the same `traffic`. `pool` and `workers` are the simulated fleet, `knowledge` is a scaler's view of
it, `bound` is the least possible cost, and `report` prints the rows. No Redis and no real worker takes part. Begin with `run`.
"""
