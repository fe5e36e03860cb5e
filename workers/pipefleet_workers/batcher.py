"""The micro-batcher: which units go through the model together. Pure logic; the clock is passed in, no threads, no torch.

Rules, in this order:

1. A unit that has waited longer than `max_age` is served next, whatever else there is (nothing starves).
2. Else the most urgent priority goes first (interactive work passes bulk).
3. Among equally urgent keys the one with the most work goes first (fullest batches).
4. A batch is cut around its first unit from the units of its key sorted by length, so that padding stays small, and ends at
   the padded cost `max_cost` (longest times count) or at `max_items`. A single unit above `max_cost` goes alone.

It is work-conserving: `take` returns a batch whenever there is a unit.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pipefleet_workers.items import Batch, Unit


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of a batch and of waiting. `max_age` in seconds, `max_cost` in padded length."""

    max_cost: int
    max_items: int
    max_age: float = 10.0


@dataclass(slots=True)
class _Lane:
    """Units of one key, sorted by length, and their total length."""

    units: list[Unit] = field(default_factory=list)
    total: int = 0

    def add(self, unit: Unit) -> None:
        bisect.insort(self.units, unit, key=lambda one: one.length)
        self.total += unit.length


class MicroBatcher:
    """Holds units until they are taken in batches. Not thread-safe: `BatchQueue` guards it."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._lanes: dict[Any, _Lane] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, unit: Unit, now: float) -> None:
        """Take in one unit at time `now` (seconds of any monotonic clock)."""
        unit.created = now
        self._lanes.setdefault(unit.key, _Lane()).add(unit)
        self._count += 1

    def take(self, now: float) -> Batch | None:
        """The best batch there is at time `now`; None only when no unit is held."""
        if not self._count:
            return None
        key, first = self._first(now)
        lane = self._lanes[key]
        low, high = self._cut(lane.units, first)
        taken = lane.units[low:high]
        del lane.units[low:high]
        lane.total -= sum(unit.length for unit in taken)
        if not lane.units:
            del self._lanes[key]
        self._count -= len(taken)
        return Batch(key, taken)

    def drop(self, stopped: Iterable[Unit]) -> None:
        """Take units out without serving them (their job was cancelled)."""
        gone = {id(unit) for unit in stopped}
        for key, lane in list(self._lanes.items()):
            lane.units = [unit for unit in lane.units if id(unit) not in gone]
            lane.total = sum(unit.length for unit in lane.units)
            if not lane.units:
                del self._lanes[key]
        self._count = sum(len(lane.units) for lane in self._lanes.values())

    def _first(self, now: float) -> tuple[Any, int]:
        """The key to serve and the index of the unit to cut around."""
        oldest_key, oldest, age = None, 0, self.limits.max_age
        best_key, best, rank = None, 0, (0, 0)
        for key, lane in self._lanes.items():
            urgent = min(unit.priority for unit in lane.units)
            for index, unit in enumerate(lane.units):
                if now - unit.created > age:
                    oldest_key, oldest, age = key, index, now - unit.created
            if best_key is None or (-urgent, lane.total) > rank:
                best_key, rank = key, (-urgent, lane.total)
                best = max(i for i, unit in enumerate(lane.units) if unit.priority == urgent)
        return (oldest_key, oldest) if oldest_key is not None else (best_key, best)

    def _cut(self, units: list[Unit], first: int) -> tuple[int, int]:
        """The slice around `first` that fits the limits: downwards first, as that adds no padding to the longest."""
        low, high = first, first + 1
        while low > 0 and self._fits(units[high - 1].length, high - low + 1):
            low -= 1
        while high < len(units) and self._fits(units[high].length, high - low + 1):
            high += 1
        return low, high

    def _fits(self, longest: int, count: int) -> bool:
        return count <= self.limits.max_items and longest * count <= self.limits.max_cost
