"""The throughput of one worker: items a second, and the share of time in which a forward ran.

`facts` asks `Pulse` for a `Beat` before each announcement, and confirms the beat once Redis has its items. `Pulse` reads the
worker's metrics. No I/O, no errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipefleet_workers.observe.metrics import Metrics, Totals
from pipefleet_workers.observe.totals import ITEM_COUNTS


@dataclass(frozen=True, slots=True)
class Beat:
    """The work of a while: items that ended, the failed, cancelled and expired items among them, and the rates."""

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
    """Makes the beats of one worker. One thread calls `beat` and `told`."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._told, self._before, self._at = Totals(), Totals(), clock()

    def beat(self) -> Beat:
        """The rates since the last call, and the numbers of items that ended since the last confirmed beat."""
        now, totals = self._clock(), self._metrics.totals()
        elapsed = max(1e-6, now - self._at)
        processed = totals.processed - self._before.processed
        busy = min(1.0, (totals.busy - self._before.busy) / elapsed)
        self._before, self._at = totals, now
        untold = {name: getattr(totals, name) - getattr(self._told, name) for name in ITEM_COUNTS}
        return Beat(totals, **untold, items_per_second=processed / elapsed, busy=busy)

    def told(self, beat: Beat) -> None:
        """Confirm a beat: the fleet has received it, so its items are not reported again."""
        self._told = beat.totals
