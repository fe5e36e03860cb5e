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
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from pipefleet_workers.items import Batch, Unit


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Bounds of a batch and of waiting. `max_cost` counts padded length; `max_age` is in seconds."""

    max_cost: int
    max_items: int
    max_age: float = 30.0


_LENGTH, _KEY = attrgetter("length"), attrgetter("key")


@dataclass(slots=True)
class _Group:
    """The units of one key, sorted by length, with counts of them: no rule looks at every unit for each batch."""

    units: list[Unit] = field(default_factory=list)
    total: int = 0
    """Their lengths together."""
    arrivals: dict[float, int] = field(default_factory=dict)
    """How many of the units came at each time, the earliest time first."""
    priorities: dict[int, int] = field(default_factory=dict)
    """How many of the units have each priority."""
    below: int = sys.maxsize
    """Length of the shortest unit of the last batch; the next batch goes on downwards from this length."""

    @property
    def urgent(self) -> int:
        """The most urgent priority of its units."""
        return min(self.priorities)

    @property
    def oldest(self) -> float:
        """When the unit came that waits longest."""
        return next(iter(self.arrivals))

    def add(self, units: Sequence[Unit], now: float) -> None:
        for unit in units:
            unit.created = now
        self.units += units
        self.units.sort(key=_LENGTH)
        self._count(units, 1)

    def take(self, low: int, high: int) -> list[Unit]:
        taken = self.units[low:high]
        del self.units[low:high]
        self._count(taken, -1)
        self.below = taken[0].length
        return taken

    def next(self, urgent: int) -> int:
        """The index of the longest unit of priority `urgent` that is not above the last batch; without one, of the longest unit.

        Starting at the longest unit each time would pad almost as much as arrival order does: a long unit would go as soon as it
        comes, together with the few short units that are there, and other short units would pile up.
        """
        place = bisect.bisect_right(self.units, self.below, key=_LENGTH)
        for index in itertools.chain(range(place - 1, -1, -1), range(len(self.units) - 1, place - 1, -1)):
            if self.units[index].priority == urgent:
                return index
        raise LookupError(f"no unit of priority {urgent}")

    def first_of(self, created: float) -> int:
        """The index of the shortest unit that came at this time."""
        return next(index for index, unit in enumerate(self.units) if unit.created == created)

    def _count(self, units: Sequence[Unit], sign: int) -> None:
        self.total += sign * sum([unit.length for unit in units])
        _add(self.arrivals, [unit.created for unit in units], sign)
        _add(self.priorities, [unit.priority for unit in units], sign)


def _add(counts: dict[Any, int], values: Sequence[Any], sign: int) -> None:
    """Count each value once more, or with `sign` -1 once less; a value that is not there any more leaves `counts`."""
    for value, count in Counter(values).items():
        counts[value] = counts.get(value, 0) + sign * count
        if not counts[value]:
            del counts[value]


class MicroBatcher:
    """Holds units until they are taken in batches. Not thread-safe: `BatchQueue` guards it."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits = limits
        self._groups: dict[Any, _Group] = {}
        self._count = 0
        self._served_aged = False

    def __len__(self) -> int:
        return self._count

    def add(self, units: Sequence[Unit], now: float) -> None:
        """Take in a slice of units at time `now` (seconds of any clock that never goes back)."""
        for key, alike in itertools.groupby(units, _KEY):
            self._groups.setdefault(key, _Group()).add(list(alike), now)
        self._count += len(units)

    def take(self, now: float, most: Callable[[Unit], int] | None = None) -> Batch | None:
        """The best batch at time `now`; None only when no unit is held, or when `most` forbids it.

        `most` says for the best unit how many units its batch may have; 0 leaves the unit where it is.
        """
        if not self._count:
            return None
        key, first = self._first(now)
        group = self._groups[key]
        bound = self.limits.max_items if most is None else min(self.limits.max_items, most(group.units[first]))
        if bound < 1:
            return None
        taken = group.take(*self._cut(group.units, first, bound))
        if not group.units:
            del self._groups[key]
        self._count -= len(taken)
        return Batch(key, taken)

    def _first(self, now: float) -> tuple[Any, int]:
        """The key to serve, and the index of the unit to cut the batch around."""
        old, age = None, self.limits.max_age
        for group in self._groups.values():
            if now - group.oldest > age:
                old, age = group, now - group.oldest
        key, group = min(self._groups.items(), key=lambda one: (one[1].urgent, -one[1].total))
        urgent = group.urgent
        if old is not None:
            index = old.first_of(old.oldest)
            if not self._served_aged or urgent >= old.units[index].priority:
                self._served_aged = True
                return old.units[index].key, index
        self._served_aged = False
        return key, group.next(urgent)

    def _cut(self, units: list[Unit], first: int, most: int) -> tuple[int, int]:
        """The slice around `first` that fits the limits. It grows downwards first, since shorter units do not add padding."""
        longest = units[first].length + units[first].fixed
        most = max(1, min(most, self.limits.max_cost // max(1, longest)))
        low, high = max(0, first + 1 - most), first + 1
        while high - low < most and high < len(units) and self._fits(units[high], high - low + 1):
            high += 1
        return low, high

    def _fits(self, longest: Unit, count: int) -> bool:
        cost = (longest.length + longest.fixed) * count
        return count <= self.limits.max_items and cost <= self.limits.max_cost
