"""A simulated accelerator: its forward takes `a + b * cost` seconds with Python's lock released. The worker's build makes it.

It shows how the engine behaves with a device that is faster, slower or steadier than the CPU at hand. The real adapter runs (a tiny
model is enough), then the thread sleeps until the simulated time is over. Results are the real model's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pipefleet_workers.items import Batch, Unit
from pipefleet_workers.observe.service_fit import ServiceTime


class SimulatedDevice:
    """Stands in for an adapter and behaves as it does, but `run` takes at least the simulated time."""

    def __init__(self, adapter: Any, service: ServiceTime) -> None:
        self._adapter = adapter
        self._service = service

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def run(self, inputs: Any, units: Sequence[Unit]) -> Any:
        """The adapter's outputs, not earlier than the simulated device would have them."""
        ready = time.perf_counter() + self._service.of(Batch(None, units).cost)
        outputs = self._adapter.run(inputs, units)
        time.sleep(max(0.0, ready - time.perf_counter()))
        return outputs
