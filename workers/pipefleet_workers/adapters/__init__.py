"""Adapters: how the inputs of a task become model inputs, batches and results. One for each way of batching, not for each task."""
