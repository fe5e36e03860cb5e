"""adapters: how the inputs of a task become model inputs, batches and results.

One adapter for each way of batching, not for each task.

`table/` says which adapter serves a task; `base.py` has the methods that the engine calls, in their order. Read `base.py` first.
"""
