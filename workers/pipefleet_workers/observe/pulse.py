"""`Pulse`: how much one worker gets done, told with its facts: items a second and the share of time in which a forward ran."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipefleet_workers.observe.metrics import Metrics, Totals
from pipefleet_workers.observe.totals import ITEM_COUNTS


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker did since the beat before: items that ended, those that failed, were cancelled or expired, and the rates."""

    totals: Totals
    items: int
    failed: int
    cancelled: int
    expired: int
    items_per_second: float
    """Items that left the engine: a shard's items do so one by one, and end together."""
    busy: float

    def to_json(self) -> dict[str, Any]:
        """What is announced: totals of this process, rates since the last announcement."""
        return {
            "items": self.totals.items,
            "failed": self.totals.failed,
            "cancelled": self.totals.cancelled,
            "expired": self.totals.expired,
            "items_per_second": round(self.items_per_second, 3),
            "busy": round(self.busy, 4),
        }


class Pulse:
    """Takes the beats of one worker. `beat` and `told` are called by one thread."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._told, self._before, self._at = Totals(), Totals(), clock()

    def beat(self) -> Beat:
        """What happened since the last call; how many items ended since the last `told`."""
        now, totals = self._clock(), self._metrics.totals()
        elapsed = max(1e-6, now - self._at)
        processed = totals.processed - self._before.processed
        busy = min(1.0, (totals.busy - self._before.busy) / elapsed)
        self._before, self._at = totals, now
        untold = {name: getattr(totals, name) - getattr(self._told, name) for name in ITEM_COUNTS}
        return Beat(totals, **untold, items_per_second=processed / elapsed, busy=busy)

    def told(self, beat: Beat) -> None:
        """The fleet has heard of this beat."""
        self._told = beat.totals
