"""The number of workers that each pool should have.

`messages` reads a pool's messages in Redis, `signal` turns them into seconds of work, `decide` decides, and `service` repeats these
steps and answers over HTTP. `command` is `pipefleet scaler`. `top` reads with `signal`; the simulator decides with `decide`.
"""
