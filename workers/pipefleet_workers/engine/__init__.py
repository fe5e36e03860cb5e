"""The stages of a worker, wired with bounded queues; micro-batches; the device and its only thread. Read `engine.py` first."""
