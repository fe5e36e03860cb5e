"""The micro-batcher: it chooses the units that go through the model together. `BatchQueue` calls it under its lock.

Pure logic: the caller passes the time, and there are no threads and no torch. The rules, in this order:

1. A unit that has waited longer than `max_age` goes next, so nothing starves. While more urgent work waits, old units get only
   every second batch: the whole backlog of a slow model is old, and interactive work must be able to pass it.
2. Otherwise the most urgent priority goes first. Among equally urgent keys the key with the most work goes first (fullest batches).
3. Within a key, batches go down from the longest units to the shortest, then start over: units of like length meet, and padding
   stays small.
4. A batch ends at the padded cost `max_cost` (longest times count) or at `max_items`. A unit above `max_cost` goes alone.

It is work-conserving: `take` returns a batch whenever it holds a unit.
"""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipefleet_workers.items import Batch, Unit


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of a batch and of waiting. `max_cost` counts padded length; `max_age` is in seconds."""

    max_cost: int
    max_items: int
    max_age: float = 30.0


@dataclass(slots=True)
class _Lane:
    """The units of one key, sorted by length, and their total length."""

    units: list[Unit] = field(default_factory=list)
    total: int = 0
    below: int = sys.maxsize
    """Length of the shortest unit of the last batch; the next batch goes on downwards from this length."""

    def add(self, unit: Unit) -> None:
        bisect.insort(self.units, unit, key=lambda one: one.length)
        self.total += unit.length

    def next(self, urgent: int) -> int:
        """The index of the longest unit of priority `urgent` that is not above the last batch; without one, of the longest unit.

        Starting at the longest unit each time would pad almost as much as arrival order does: a long unit would go as soon as it
        comes, together with the few short units that are there, and other short units would pile up.
        """
        indices = [index for index, unit in enumerate(self.units) if unit.priority == urgent]
        return next((index for index in reversed(indices) if self.units[index].length <= self.below), indices[-1])


class MicroBatcher:
    """Holds units until they are taken in batches. Not thread-safe: `BatchQueue` guards it."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._lanes: dict[Any, _Lane] = {}
        self._count = 0
        self._served_aged = False

    def __len__(self) -> int:
        return self._count

    def add(self, unit: Unit, now: float) -> None:
        """Take in one unit at time `now` (seconds of any monotonic clock)."""
        unit.created = now
        self._lanes.setdefault(unit.key, _Lane()).add(unit)
        self._count += 1

    def take(self, now: float, most: Callable[[Unit], int] | None = None) -> Batch | None:
        """The best batch at time `now`; None only when no unit is held, or when `most` forbids it.

        `most` says for the best unit how many units its batch may have; 0 leaves the unit where it is.
        """
        if not self._count:
            return None
        key, first = self._first(now)
        lane = self._lanes[key]
        bound = self.limits.max_items if most is None else most(lane.units[first])
        if bound < 1:
            return None
        low, high = self._cut(lane.units, first, bound)
        taken = lane.units[low:high]
        del lane.units[low:high]
        lane.total -= sum(unit.length for unit in taken)
        lane.below = taken[0].length
        if not lane.units:
            del self._lanes[key]
        self._count -= len(taken)
        return Batch(key, taken)

    def _first(self, now: float) -> tuple[Any, int]:
        """The key to serve, and the index of the unit to cut the batch around."""
        aged: tuple[Any, int] | None = None
        age = self.limits.max_age
        ranked: list[tuple[int, int, Any]] = []
        for key, lane in self._lanes.items():
            urgent = min(unit.priority for unit in lane.units)
            for index, unit in enumerate(lane.units):
                if now - unit.created > age:
                    aged, age = (key, index), now - unit.created
            ranked.append((urgent, -lane.total, key))
        urgent, _, key = min(ranked, key=lambda one: one[:2])
        self._served_aged = aged is not None and not (self._served_aged and urgent < self._priority(aged))
        return aged if self._served_aged and aged is not None else (key, self._lanes[key].next(urgent))

    def _priority(self, place: tuple[Any, int]) -> int:
        key, index = place
        return self._lanes[key].units[index].priority

    def _cut(self, units: list[Unit], first: int, most: int) -> tuple[int, int]:
        """The slice around `first` that fits the limits. It grows downwards first, since shorter units do not add padding."""
        low, high = first, first + 1
        while high - low < most and low > 0 and self._fits(units[high - 1], high - low + 1):
            low -= 1
        while high - low < most and high < len(units) and self._fits(units[high], high - low + 1):
            high += 1
        return low, high

    def _fits(self, longest: Unit, count: int) -> bool:
        cost = (longest.length + longest.fixed) * count
        return count <= self.limits.max_items and cost <= self.limits.max_cost
