"""The worker's half of the task table: how each task is loaded, batched and finished. `RUNTIME` holds all rows.

Rows have the names of `pipefleet.tasks.TASKS`. The media in the producer's row decide how inputs are decoded. A new task type
starts with a row here and a row there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pipefleet_workers.adapters.table import audio, multimodal, text, vision
from pipefleet_workers.adapters.table.row import TaskRuntime

__all__ = ["RUNTIME", "TaskRuntime"]

RUNTIME: Mapping[str, TaskRuntime] = MappingProxyType({**text.ROWS, **audio.ROWS, **vision.ROWS, **multimodal.ROWS})
"""Adapters: how the inputs of a task become model inputs, batches and results. One for each way of batching, not for each task."""
