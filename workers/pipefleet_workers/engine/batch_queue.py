"""The bounded room between preprocessing and the device: a MicroBatcher behind one lock. The engine makes one.

Threads of the `cpu` stage put units in; the lanes of the device take batches out. `put` blocks while the room is full, so a slow
device slows every stage before it. `take` blocks while the room is empty.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pipefleet_workers.engine.batcher import MicroBatcher
from pipefleet_workers.items import Batch, Unit


class BatchQueue:
    """Holds at most `capacity` units; the units of one item always enter together. Thread-safe."""

    def __init__(self, batcher: MicroBatcher, capacity: int) -> None:
        self._batcher = batcher
        self._capacity = capacity
        lock = threading.Lock()
        self._filled, self._freed = threading.Condition(lock), threading.Condition(lock)

    def put(self, units: Sequence[Unit]) -> None:
        """Add units; block while the room is full."""
        with self._freed:
            self._freed.wait_for(lambda: len(self._batcher) < self._capacity)
            self._batcher.add(units, time.monotonic())
            self._filled.notify()

    def take(self, stopping: threading.Event, held: Callable[[], bool] = lambda: False) -> Batch | None:
        """The next batch; blocks while there is none. After `stopping` it returns the remaining batches, then None.

        While `held()` it takes none, so that units gather; whoever changes its answer calls `wake`.
        """
        with self._filled:
            self._filled.wait_for(lambda: (len(self._batcher) > 0 and not held()) or stopping.is_set())
            batch = self._batcher.take(time.monotonic())
            if len(self._batcher):
                self._filled.notify()  # another lane: `put` wakes only one
            self._freed.notify_all()
            return batch

    def poll(self, most: Callable[[Unit], int]) -> Batch | None:
        """The next batch, or None at once; `most` bounds it as in `MicroBatcher.take`, and must not call the room."""
        with self._freed:
            batch = self._batcher.take(time.monotonic(), most)
            self._freed.notify_all()
            return batch

    def wait(self, stopping: threading.Event) -> bool:
        """Wait for a unit. False after `stopping`, when none is left."""
        with self._filled:
            self._filled.wait_for(lambda: len(self._batcher) > 0 or stopping.is_set())
            return len(self._batcher) > 0

    def limit_cost(self, cost: int) -> None:
        """Make later batches smaller; the bound never rises again."""
        with self._filled:
            limits = self._batcher.limits
            self._batcher.limits = replace(limits, max_cost=max(1, min(limits.max_cost, cost)))

    def wake(self) -> None:
        """Wake the threads in `take`, so that they see `stopping`."""
        with self._filled:
            self._filled.notify_all()

    def __len__(self) -> int:
        with self._filled:
            return len(self._batcher)
