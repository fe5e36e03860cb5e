"""Pipelines of tasks that transformers no longer has. Each registers itself as `pipefleet/<task>` when it is imported."""
