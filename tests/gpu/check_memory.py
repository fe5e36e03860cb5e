"""The device really runs out of memory: the batch is halved until it fits, and the engine goes on with smaller batches.

A GPU is filled first. In a rehearsal the process gets a limit of address space, and the host's allocator fails.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.items import Unit
from tests.gpu.engines import engine, load, outputs, tolerance
from tests.gpu.plan import Check, Order
from tests.gpu.same import differences
from tests.parity.harness import Call

ROW = 256 << 20
"""Bytes that each row of a batch takes beside its model."""
ROOM = 5 * ROW + (ROW >> 1)
"""Bytes that are left: a batch of four fits, one of eight does not."""
ROWS = 16
PIECE = 1 << 30
TASK = "text-classification"


class Hungry(TextClassifier):
    """Takes `ROW` bytes of the device for each row while it runs."""

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        taken = [torch.empty(ROW, dtype=torch.uint8, device=self.pipe.device) for _ in units]
        found = super().run(inputs, units, progress)
        del taken
        return found


def _halves(order: Order) -> str:
    pipe = load(TASK, order.device)
    calls = [Call("word " * (1 + index % 4)) for index in range(ROWS)]
    wanted = [pipe(call.inputs) for call in calls]
    with engine(pipe, TASK, adapter=Hungry, max_cost=4096, held=True) as running:
        ballast = _fill(pipe.device)
        found = outputs(running.together(calls))
        sizes = [len(batch.units) for batch in running.adapter.batches]
        again = outputs(running.run(calls))
        later = [len(batch.units) for batch in running.adapter.batches][len(sizes) :]
        del ballast
    for results in (found, again):
        if apart := differences(results, wanted, tolerance(order.device)):
            raise AssertionError(f"after the halving {apart[0]}")
    if sizes[:3] != [ROWS, ROWS // 2, ROWS // 4]:
        raise AssertionError(f"batches of {sizes} instead of {ROWS}, {ROWS // 2}, {ROWS // 4}, …")
    if max(later) >= ROWS:
        raise AssertionError(f"a later batch has {max(later)} rows again")
    return f"batches of {sizes}, then of {later}; every result right"


def _fill(device: torch.device) -> list[torch.Tensor]:
    """Leave `ROOM` bytes of the device; what is returned holds the rest."""
    if device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM, resource.RLIM_INFINITY))
        return []
    torch.cuda.empty_cache()
    ballast = []
    while (free := torch.cuda.mem_get_info(device)[0] - ROOM) > (1 << 20):
        ballast.append(torch.empty(min(free, PIECE), dtype=torch.uint8, device=device))
    return ballast


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


CHECKS = (Check("out of memory", "check", _halves, 60.0, quick=True, alone=True),)
