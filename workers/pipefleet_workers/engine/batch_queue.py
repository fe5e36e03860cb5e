"""The bounded, thread-safe room between preprocessing and the device: a MicroBatcher behind one lock.

`put` blocks while it is full, so that a slow device slows everything before it; `take` blocks while it is empty.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from pipefleet_workers.engine.batcher import MicroBatcher
from pipefleet_workers.items import Batch, Unit


class BatchQueue:
    """At most `capacity` units wait here, but an item's units always enter together."""

    def __init__(self, batcher: MicroBatcher, capacity: int) -> None:
        self._batcher = batcher
        self._capacity = capacity
        self._changed = threading.Condition()

    def put(self, units: Sequence[Unit]) -> None:
        """Add units; blocks while the room is full."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._batcher) < self._capacity)
            now = time.monotonic()
            for unit in units:
                self._batcher.add(unit, now)
            self._changed.notify_all()

    def take(self, stopping: threading.Event) -> Batch | None:
        """The next batch; blocks while there is none. After `stopping` it goes on with what is there, and is None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._batcher) > 0 or stopping.is_set())
            batch = self._batcher.take(time.monotonic())
            self._changed.notify_all()
            return batch

    def limit_cost(self, cost: int) -> None:
        """Make batches smaller from now on; never larger."""
        with self._changed:
            limits = self._batcher.limits
            self._batcher.limits = replace(limits, max_cost=max(1, min(limits.max_cost, cost)))

    def wake(self) -> None:
        """Let those that wait in `take` see that they are to stop."""
        with self._changed:
            self._changed.notify_all()

    def __len__(self) -> int:
        with self._changed:
            return len(self._batcher)
