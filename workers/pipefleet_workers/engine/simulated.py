"""A simulated accelerator: its forward takes `a + b * cost` seconds with Python's lock released.

It shows how well the engine feeds a device that is faster, slower or steadier than the CPU at hand. The real adapter runs (a tiny
model will do), then the thread sleeps until the simulated time is over. Results are the real model's. The engine makes a
`SimulatedForward` if the setting `simulated_device` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter, sleep
from typing import Any

from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.transfer import Transfer
from pipefleet_workers.items import Batch, Unit
from pipefleet_workers.observe.service_fit import ServiceTime


class SimulatedForward(Forward):
    """A `Forward` on a device of a given service time."""

    def __init__(
        self,
        adapter: Adapter,
        on_memory: Callable[[int], None],
        transfer: Transfer | None = None,
        *,
        service: ServiceTime,
    ) -> None:
        super().__init__(adapter, on_memory, transfer)
        self._service = service

    def _through_model(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        ready = perf_counter() + self._service.of(Batch(None, units).cost)
        outputs = super()._through_model(inputs, units, progress)
        sleep(max(0.0, ready - perf_counter()))
        return outputs
