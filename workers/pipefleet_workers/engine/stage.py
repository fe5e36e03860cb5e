"""A stage of the engine: threads that take slices of items from one bounded queue.

    put ─▶ the most urgent slice first, equally urgent ones in order ─▶ handle, on any of the threads

The engine makes a stage for each kind of work and puts slices in. An error of `handle` fails the items of its slice; the
threads go on.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from pipefleet.contract.records import JobFailure
from pipefleet.service import Service
from pipefleet_workers.adapters.base import brief
from pipefleet_workers.items import Assembly, Decoded, Fetched, Finished, Outcome, Work
from pipefleet_workers.process.torch_threads import torch_threads, use_torch_threads
from pipefleet_workers.process.watchdog import Slot, Watchdog, listen, waiting

log = logging.getLogger(__name__)


class SliceQueue:
    """At most `room` slices, the most urgent first. Thread-safe."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._slices: list[tuple[int, int, Any]] = []
        self._order = itertools.count()
        lock = threading.Lock()
        self._filled, self._freed = threading.Condition(lock), threading.Condition(lock)

    def put(self, priority: int, items: Any) -> None:
        """Add one slice; blocks while the queue is full."""
        with self._freed:
            self._freed.wait_for(lambda: len(self._slices) < self._room)
            heapq.heappush(self._slices, (priority, next(self._order), items))
            self._filled.notify()

    def take(self, stopping: threading.Event) -> Any:
        """The next slice; blocks while there is none. After `stopping` it returns the remaining slices, then None."""
        with self._filled:
            self._filled.wait_for(lambda: self._slices or stopping.is_set())
            if not self._slices:
                return None
            self._freed.notify()
            return heapq.heappop(self._slices)[2]

    def wake(self) -> None:
        """Wake the threads in `take`, so that they see `stopping`."""
        with self._filled:
            self._filled.notify_all()


class Stage:
    """A service of several threads.

    A `watchdog` watches the threads. `handle` calls `working_on` at each item; otherwise its whole slice counts as one item. It
    waits for other threads only inside `waiting`. Stages that wait for services have no watchdog, since services have time-outs.
    `end` gets the failures of the items of a slice for which `handle` raised an error.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        handle: Callable[[Any], None],
        end: Callable[[Outcome], None],
        *,
        room: int,
        watchdog: Watchdog | None,
        seconds: float,
    ) -> None:
        """At most `room` slices wait. An item may take `seconds`. The caller starts the `watchdog`.

        The threads of the stage divide the torch threads of the calling thread among themselves.
        """
        self._name = name
        self._handle = handle
        self._end = end
        self._queue = SliceQueue(room)
        self._slots = [] if watchdog is None else [watchdog.slot(name, seconds) for _ in range(threads)]
        self._torch_threads = max(1, torch_threads() // threads)
        self._service = Service(name, self._loop, wake=self._queue.wake, threads=threads)

    def start(self) -> None:
        """Start the threads, unless they run already."""
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Work off the queue, then end, within `timeout` seconds (None: no bound). Whether the threads have ended."""
        return self._service.stop(timeout)

    def put(self, priority: int, items: Any) -> None:
        """Add one slice; blocks while the queue is full."""
        with waiting():
            self._queue.put(priority, items)

    def fail(self, items: Sequence[Any], error: BaseException) -> None:
        """End the items of a slice for which `handle` raised `error`. Called inside the `except`, since it logs the traceback."""
        log.exception("stage %s failed on a slice of %d", self._name, len(items))
        failure = JobFailure("internal_error", brief(error), self._name)
        for item in items:  # items that have ended already keep their outcome
            self._end(Outcome(work_of(item), failure=failure))

    def _loop(self, stopping: threading.Event) -> None:
        slot = self._slots.pop() if self._slots else None
        use_torch_threads(self._torch_threads)
        if slot is not None:
            listen(slot)
        while (items := self._queue.take(stopping)) is not None:
            self._handle_slice(items, slot)
        if slot is not None:
            self._slots.append(slot)

    def _handle_slice(self, items: Sequence[Any], slot: Slot | None) -> None:
        if slot is not None:
            slot.begin(work_of(items[0]), len(items) - 1)
        try:
            self._handle(items)
        except BaseException as error:  # noqa: BLE001 - `fail` logs it; a Rust panic is no Exception, and the thread must go on
            self.fail(items, error)
        if slot is not None:
            slot.rest()


def work_of(item: Work | Fetched | Decoded | Assembly | Finished) -> Work:
    """The admitted item behind an object that passes between stages."""
    return item if isinstance(item, Work) else item.work
