"""What makes a fast device faster, each where it is asked for and proved: pictures on the device, a compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.vision.on_device import on_device
from pipefleet_workers.models.compiled import compile_forward
from pipefleet_workers.settings import WorkerSettings


def accelerated(
    adapter: Adapter, pool: Pool, parameters: Mapping[str, Any], settings: WorkerSettings, *, max_cost: int
) -> Adapter:
    """`adapter`, or the one to take in its place. Before the warm-up, which measures what comes of it.

    Raises UsageError where the pool asks for what its model cannot have.
    """
    chosen, on_gpu = settings.device_pictures, adapter.pipe.device.type == "cuda"
    # Processes bring back whole inputs: pictures that are not small yet would fill the memory they share.
    if chosen == "on" or (chosen == "auto" and on_gpu and not settings.preprocess_processes):
        adapter = on_device(adapter)
    if pool.compile:
        compile_forward(adapter, pool, parameters, max_cost=max_cost)
    return adapter
