"""The type of the task table's worker half: `TaskRuntime` is one row, `Sizing` its slices and batches.

The other modules of `table` make the rows. Loading, the warm-up and the engine read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipefleet_workers.adapters.base import Adapter


@dataclass(frozen=True, slots=True)
class Sizing:
    """The number of items in a slice of a stage, and the padded cost of a batch on CPU and on a GPU, used until it is measured.

    The cost counts the units that the adapter pads: tokens of a text (read and written), frames of a recording, elements of a
    picture's tensor.
    """

    slice_items: int
    cpu_cost: int
    gpu_cost: int


@dataclass(frozen=True, slots=True)
class TaskRuntime:
    """One row: how inputs become model inputs, batches and results, and how large slices and batches should be."""

    adapter: Callable[[Any], Adapter]
    """Makes the adapter of a loaded pipeline: a class, or a function that chooses one by the model."""
    sizing: Sizing
    transformers_task: str = ""
    """The task's name in `transformers.pipeline`; empty if it is the same name."""
    example_parameters: Mapping[str, Any] = field(default_factory=dict)
    """Parameters that any call of the task needs, for the examples of the warm-up."""


TEXT = Sizing(slice_items=64, cpu_cost=2048, gpu_cost=65_536)
WRITING = Sizing(slice_items=8, cpu_cost=4096, gpu_cost=32_768)
IMAGE = Sizing(slice_items=2, cpu_cost=16 * 150_528, gpu_cost=256 * 150_528)
SPEECH = Sizing(slice_items=1, cpu_cost=8 * 4500, gpu_cost=64 * 4500)
