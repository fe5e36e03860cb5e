"""`Service`: a background thread, or several that do the same, with one `start` and one `stop`; `Inbox`: a queue that it reads.

A service calls its loop on its thread. The owner of the service starts and stops it; constructors start nothing.

    start ──▶ loop(stopping) runs ──▶ stop sets `stopping` and calls `wake` ──▶ the loop returns ──▶ stop has joined it

An error that leaves the loop ends the thread; it is logged and passed to `on_error`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from pipefleet.forking import renew_after_fork

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Stoppable(Protocol):
    """The calls of every service: from any thread, in any order, any number of times."""

    def start(self) -> None:
        """Begin. Does nothing while the service runs; after `stop` it begins anew."""

    def stop(self, timeout: float | None = None) -> bool:
        """Tell the service to end, and wait up to `timeout` seconds (None: without bound). Returns whether it has ended."""


class Service:
    """Runs `loop(stopping)` on `threads` threads called `name`. Thread-safe.

    The loop returns soon after the event `stopping` is set, or by itself. Each `stop` calls `wake`, which must wake a loop that
    waits for anything but the event. A loop that ends by itself sets the event before its last look for work: a `start` after
    this begins new threads, which find the work that the last look missed.

    New threads wait for the end of the threads before them, so the loop never runs twice at once. In a forked process the service
    is stopped, and may be started.
    """

    _lock: threading.Lock
    _stopping: threading.Event
    _threads: list[threading.Thread]

    def __init__(
        self,
        name: str,
        loop: Callable[[threading.Event], object],
        *,
        wake: Callable[[], object] = lambda: None,
        on_error: Callable[[BaseException], object] = lambda error: None,
        threads: int = 1,
        daemon: bool = True,
    ) -> None:
        """With `daemon`, the process may end while the loop runs. The thread that ends by an error calls `on_error` with it."""
        self._loop = loop
        self._wake = wake
        self._on_error = on_error
        self._names = [name] if threads == 1 else [f"{name}-{index}" for index in range(threads)]
        self._daemon = daemon
        self.after_fork()
        renew_after_fork(self)

    @property
    def alive(self) -> bool:
        """Whether one of its threads lives, even if it was told to stop."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def running(self) -> bool:
        """Whether one of its threads lives and was not told to stop; then `start` does nothing."""
        return self.alive and not self._stopping.is_set()

    def start(self) -> None:
        """Begin. Does nothing while the service runs; after `stop` it begins anew, once the threads before have ended."""
        with self._lock:
            before = [thread for thread in self._threads if thread.is_alive()]
            if before and not self._stopping.is_set():
                return
            self._stopping, self._threads = threading.Event(), []
            for name in self._names:
                thread = threading.Thread(
                    target=self._run, args=(self._stopping, before), name=name, daemon=self._daemon
                )
                thread.start()
                self._threads.append(thread)

    def stop(self, timeout: float | None = None) -> bool:
        """Tell the loop to end, and wait for it up to `timeout` seconds (None: without bound). Returns whether it has ended.

        Does nothing before `start`. A thread of the service may call it; that thread does not wait for itself.
        """
        with self._lock:
            threads = list(self._threads)
            self._stopping.set()
        if any(thread.is_alive() for thread in threads):
            self._wake()
        return _joined(threads, timeout)

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds until the loop ends by itself. Returns whether it has ended."""
        with self._lock:
            threads = list(self._threads)
        return _joined(threads, timeout)

    def after_fork(self) -> None:
        """The child has none of the threads."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = []

    def _run(self, stopping: threading.Event, before: Sequence[threading.Thread]) -> None:
        for thread in before:
            thread.join()
        try:
            self._loop(stopping)
        except BaseException as error:
            log.exception("the thread %s ended by an error", threading.current_thread().name)
            self._on_error(error)


class Services:
    """Several services that start and stop together. Thread-safe."""

    def __init__(self, *services: Stoppable) -> None:
        self._services = services

    def start(self) -> None:
        """Start them in their order."""
        for service in self._services:
            service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Tell all of them to end, then wait up to `timeout` seconds for all. Returns whether all have ended."""
        end = _end(timeout)
        for service in self._services:
            service.stop(0.0)
        return all([service.stop(_left(end)) for service in self._services])


class Inbox(Generic[_T]):
    """A queue that the loop of a service reads. Thread-safe; unbounded. The service gets `wake`."""

    def __init__(self) -> None:
        self._items: deque[_T] = deque()
        self._changed = threading.Condition(threading.Lock())

    def put(self, item: _T) -> None:
        """Add an item; never waits."""
        with self._changed:
            self._items.append(item)
            self._changed.notify()

    def take(self, stopping: threading.Event, *, most: int = 1, seconds: float | None = None) -> list[_T]:
        """The oldest items, at most `most`. Waits up to `seconds` for the first one; an empty list if none came.

        Once `stopping` is set it does not wait. So a loop that ends at an empty list has worked off all items.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or stopping.is_set(), seconds)
            return [self._items.popleft() for _ in range(min(most, len(self._items)))]

    def each(self, stopping: threading.Event) -> Iterator[_T]:
        """Item by item, until `stopping` is set and no item is left."""
        while items := self.take(stopping):
            yield from items

    def wake(self) -> None:
        """Wake the threads that wait in `take`, so that they see that `stopping` is set."""
        with self._changed:
            self._changed.notify_all()


def _joined(threads: Sequence[threading.Thread], timeout: float | None) -> bool:
    end = _end(timeout)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_left(end))
    return not any(thread.is_alive() for thread in threads)


def _end(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())
