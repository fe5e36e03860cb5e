"""Speeds up a worker by three means, each proved before use: oneDNN on a CPU, pictures on a GPU, a compiled model.

`build` calls `accelerated` between loading and warm-up, and goes on with the adapter that it returns. A means whose proof fails is
left out. A pool that asks for a compiled model that cannot be compiled raises UsageError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.vision.on_device import on_device
from pipefleet_workers.models.compiled import compile_forward
from pipefleet_workers.models.linears import faster_linears
from pipefleet_workers.settings import WorkerSettings


def accelerated(
    adapter: Adapter, pool: Pool, parameters: Mapping[str, Any], settings: WorkerSettings, *, max_cost: int
) -> Adapter:
    """`adapter`, or the adapter to use in its place. Call it before the warm-up, which measures the result.

    Raises UsageError if the pool asks for something that its model cannot have.
    """
    chosen, on_gpu = settings.device_pictures, adapter.pipe.device.type == "cuda"
    # Preprocessing in processes returns whole inputs: pictures in full size would fill the shared memory.
    if chosen == "on" or (chosen == "auto" and on_gpu and not settings.preprocess_processes):
        adapter = on_device(adapter)
    if settings.onednn == "auto" and not pool.compile:  # a compiler chooses its own products
        faster_linears(adapter.pipe.model)
    if pool.compile:
        compile_forward(adapter, pool, parameters, max_cost=max_cost)
    return adapter
