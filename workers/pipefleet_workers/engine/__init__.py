"""engine: the stages of a worker, the queues between them, and the lanes of the device. Read `engine.py` first.

Items come in through `Engine.admit`; their outcomes go to the sinks of their jobs. Only `consume` calls it.
"""
