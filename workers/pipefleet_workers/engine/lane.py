"""A lane of the device, and the order among lanes: who runs now, and whose are the device's seconds. `Device` uses both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipefleet_workers.models.lanes import Lanes
from pipefleet_workers.process.torch_threads import use_torch_threads
from pipefleet_workers.process.watchdog import Slot


class Lane:
    """A thread that runs batches, one at a time. Only this thread uses the lane."""

    def __init__(self, index: int, plan: Lanes, slot: Slot) -> None:
        self.index = index
        self.slot = slot
        self._plan = plan

    def share(self, cost: int, *, alone: bool) -> None:
        """Take the torch threads for the next batch: all of them for a batch that is `alone` on the device, unless it is small."""
        threads = self._plan.alone if alone else self._plan.threads
        if cost <= self._plan.one_thread:
            threads = 1
        if threads:
            use_torch_threads(threads)


class Sharing:
    """The lanes that run now, and their device seconds: of a second in which k lanes run, each lane counts 1/k. Thread-safe.

    All lanes together never count more than the time that has passed, so the busy share of a device is at most 1.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._changed = threading.Condition()
        self._at = self._counted = 0.0
        self._running = 0
        self._alone = False

    @property
    def running(self) -> int:
        """Lanes that run now."""
        return self._running

    def begin(self) -> float:
        """A lane begins to run, after the end of a batch that has to run alone; pass the result to `end`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            return self._begin()

    def end(self, begun: float) -> float:
        """The lane has ended; its device seconds."""
        with self._changed:
            self._advance()
            self._running -= 1
            self._changed.notify_all()
            return self._counted - begun

    @contextmanager
    def alone(self) -> Iterator[float]:
        """A context in which no other lane runs, for a lane that does not run yet. Gives what `begin` gives; call `end` inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._running == 0)
                begun = self._begin()
            yield begun
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _begin(self) -> float:
        self._advance()
        self._running += 1
        return self._counted

    def _advance(self) -> None:
        now = self._now()
        if self._running:
            self._counted += (now - self._at) / self._running
        self._at = now
