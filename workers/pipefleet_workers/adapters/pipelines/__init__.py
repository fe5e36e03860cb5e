"""Pipelines of tasks that transformers no longer has; each registers itself as `pipefleet/<task>` when it is imported."""
