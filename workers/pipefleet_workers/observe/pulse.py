"""`Pulse`: the throughput of one worker, announced with its facts: items a second, and the share of time with a running forward."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipefleet_workers.observe.metrics import Metrics, Totals
from pipefleet_workers.observe.totals import ITEM_COUNTS


@dataclass(frozen=True, slots=True)
class Beat:
    """The work since the beat before: items that ended, items that failed, were cancelled or expired, and the rates."""

    totals: Totals
    items: int
    failed: int
    cancelled: int
    expired: int
    items_per_second: float
    """Items that left the engine. The items of a shard leave it one by one, but end together."""
    busy: float

    def to_json(self) -> dict[str, Any]:
        """The fields of the announcement: totals of this process, rates since the last announcement."""
        return {
            "items": self.totals.items,
            "failed": self.totals.failed,
            "cancelled": self.totals.cancelled,
            "expired": self.totals.expired,
            "items_per_second": round(self.items_per_second, 3),
            "busy": round(self.busy, 4),
        }


class Pulse:
    """Takes the beats of one worker. One thread calls `beat` and `told`."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._told, self._before, self._at = Totals(), Totals(), clock()

    def beat(self) -> Beat:
        """The work since the last call, and the number of items that ended since the last `told`."""
        now, totals = self._clock(), self._metrics.totals()
        elapsed = max(1e-6, now - self._at)
        processed = totals.processed - self._before.processed
        busy = min(1.0, (totals.busy - self._before.busy) / elapsed)
        self._before, self._at = totals, now
        untold = {name: getattr(totals, name) - getattr(self._told, name) for name in ITEM_COUNTS}
        return Beat(totals, **untold, items_per_second=processed / elapsed, busy=busy)

    def told(self, beat: Beat) -> None:
        """Note that the fleet has received this beat."""
        self._told = beat.totals
