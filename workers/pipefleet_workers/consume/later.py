"""`Later`: keeps deliveries until their time has come, in memory; their leases are renewed meanwhile.

The consumer puts in postponed deliveries, and deliveries with a start time. One thread of the consumer takes due deliveries out. A
closed `Later` refuses deliveries: the caller then gives them back.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")
LONGEST_WAIT = 3600.0
"""Most seconds of one wait: a message may name a year for which the interpreter cannot wait."""


class Later(Generic[_T]):
    """Keeps things until they are due; things of the same time stay in their order. Thread-safe.

    `clock` counts seconds from any point. After a test moves such a clock, it must call `look`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, _T]] = []
        self._order = itertools.count()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, value: _T, seconds: float) -> bool:
        """Keep `value` for `seconds`. Returns False when this is closed; then the value is not kept."""
        with self._changed:
            if self._closed:
                return False
            heapq.heappush(self._heap, (self._clock() + seconds, next(self._order), value))
            self._changed.notify_all()
            return True

    def take(self) -> list[_T]:
        """Wait until a thing is due, and take all due things; returns an empty list once this is closed."""
        with self._changed:
            while not self._closed:
                due = self._due()
                if due:
                    return due
                self._changed.wait(min(LONGEST_WAIT, self._heap[0][0] - self._clock()) if self._heap else None)
            return []

    def pick(self, wanted: Callable[[_T], bool]) -> list[_T]:
        """Take out the things for which `wanted` is true, due or not."""
        with self._changed:
            found = [entry for entry in self._heap if wanted(entry[2])]
            self._heap = [entry for entry in self._heap if not wanted(entry[2])]
            heapq.heapify(self._heap)
            return [value for *_, value in sorted(found, key=lambda entry: entry[:2])]

    def close(self) -> list[_T]:
        """Take no more things; returns the kept things, the first due first."""
        with self._changed:
            self._closed = True
            left, self._heap = sorted(self._heap, key=lambda entry: entry[:2]), []
            self._changed.notify_all()
        return [value for *_, value in left]

    def look(self) -> None:
        """Read the clock again."""
        with self._changed:
            self._changed.notify_all()

    def _due(self) -> list[_T]:
        now, due = self._clock(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        return due
