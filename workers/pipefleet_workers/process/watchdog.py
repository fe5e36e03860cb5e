"""The watchdog ends the process when work on an item does not end in time, since no code inside the process can end that work.

    thread:    working_on(item) ─▶ work ─▶ tick (a sign of life) ─▶ waiting(): not timed ─▶ rest
    watchdog:  looks at every slot, LOOKS times within the shortest time allowed; a slot without a sign of life ─▶ on_hang

The engine makes the watchdog, with a slot for each working thread; one thread looks at all slots. The message of a hang names
stage, job and item. The job is delivered again; a job that hangs each time is found like any job that kills its workers
(`consume.suspects`).

Code that never releases Python's lock, such as a regular expression that backtracks for ever, stops the watchdog as well. Then
`faulthandler`, which needs no lock, prints the position of every thread and ends the process with code 1.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from pipefleet.service import Service
from pipefleet_workers.items import Work
from pipefleet_workers.process.exit_codes import HUNG_STAGE

LOOKS = 10
"""Number of looks within the shortest time that work may take."""
LOCKED_SECONDS = 120.0
"""Python's lock may be held in one piece for this long, or for twice the longest time of work, whichever is longer."""


class _Begun(NamedTuple):
    """The begun work; each sign of life makes a new object."""

    work: Work | None
    others: int


class Listener(Protocol):
    """Gets the items that one thread works on."""

    def begin(self, work: Work | None, others: int = 0) -> None:
        """The thread begins an item; `others` more items cannot be told apart from it."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the thread waits, which may last."""
        yield


class Slot:
    """The current work of one thread: the thread writes it, the watchdog reads it."""

    def __init__(self, stage: str, seconds: float, code: int) -> None:
        self.stage = stage
        self.seconds = seconds
        self.code = code
        self.begun: _Begun | None = None
        self.seen: _Begun | None = None
        """The work that the watchdog saw at its last look; `unchanged` counts the seconds for which it has not changed."""
        self.unchanged = 0.0

    def begin(self, work: Work | None, others: int = 0) -> None:
        """The thread begins an item; `others` more items cannot be told apart from it."""
        self.begun = _Begun(work, others)

    def tick(self) -> None:
        """A sign of life from inside the work: its time starts again."""
        if self.begun is not None:
            self.begun = _Begun(*self.begun)

    def rest(self) -> None:
        """The thread has no work now."""
        self.begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which the thread waits for others, which may last."""
        with self._instead_of(None):
            yield

    @contextmanager
    def meanwhile(self, work: Work, others: int = 0) -> Iterator[None]:
        """A context in which the thread works on other items; then it goes on with the item before."""
        with self._instead_of(_Begun(work, others)):
            yield

    @contextmanager
    def _instead_of(self, other: _Begun | None) -> Iterator[None]:
        before, self.begun = self.begun, other
        try:
            yield
        finally:
            self.begun = None if before is None else _Begun(*before)

    def look(self, passed: float) -> str | None:
        """The message if the thread hangs, `passed` seconds after the last look; else None.

        Called by the watchdog's thread alone.
        """
        begun = self.begun
        self.unchanged = self.unchanged + passed if begun is self.seen and begun is not None else 0.0
        self.seen = begun
        if begun is None or self.unchanged < self.seconds:
            return None
        return f"stage {self.stage} has not ended {_named(begun)} within {self.seconds:.0f} s"


class Watchdog:
    """Watches the slots of all threads. Its own thread calls `on_hang(code, reason)`, once."""

    def __init__(self, on_hang: Callable[[int, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_hang = on_hang
        self._clock = clock
        self._looked = clock()
        self._slots: list[Slot] = []
        self._service = Service("watchdog", self._watch)

    def slot(self, stage: str, seconds: float, code: int = HUNG_STAGE) -> Slot:
        """A slot for one thread, whose work on an item may take `seconds`. Call it before `start`."""
        self._slots.append(Slot(stage, seconds, code))
        return self._slots[-1]

    def start(self) -> None:
        """Begin to watch; the thread ends by itself after it has found a hang."""
        self._arm()  # here: a thread that holds Python's lock from now on would keep the watchdog's from doing it
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Stop watching. Whether its thread has ended within `timeout` seconds."""
        ended = self._service.stop(timeout)
        faulthandler.cancel_dump_traceback_later()
        return ended

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has found a hang and ended. Whether it did so within `timeout` seconds."""
        return self._service.join(timeout)

    def look(self) -> bool:
        """Look at every slot; returns whether all is well.

        A process that was stopped and goes on, or a machine that slept, does not hang: such a gap counts as two intervals.
        """
        now = self._clock()
        passed, self._looked = min(now - self._looked, 2 * self._interval), now
        found = [(slot.code, said) for slot in self._slots if (said := slot.look(passed)) is not None]
        if found:
            self._on_hang(*found[0])
        return not found

    @property
    def _interval(self) -> float:
        return min((slot.seconds for slot in self._slots), default=LOCKED_SECONDS) / LOOKS

    def _watch(self, stopping: threading.Event) -> None:
        self._looked = self._clock()
        try:
            while not stopping.wait(self._interval):
                self._arm()
                if not self.look():
                    stopping.set()
        finally:  # also where a `stop` that did not wait came in between
            faulthandler.cancel_dump_traceback_later()

    def _arm(self) -> None:
        """End the process unless this is called again in time."""
        seconds = max(LOCKED_SECONDS, 2 * max((slot.seconds for slot in self._slots), default=0.0))
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


_thread = threading.local()


def listen(to: Listener | None) -> None:
    """From now on, pass the items that the calling thread works on to this listener."""
    _thread.listener = to


def listener() -> Listener | None:
    """The listener of the calling thread, which may pass it on to threads that work for it."""
    found: Listener | None = getattr(_thread, "listener", None)
    return found


@contextmanager
def watched(stage: str, seconds: float, code: int, on_hang: Callable[[int, str], None]) -> Iterator[None]:
    """A context whose work is watched, for a thread without a slot: each `working_on` inside gives it `seconds` more."""
    watchdog = Watchdog(on_hang)
    slot = watchdog.slot(stage, seconds, code)
    watchdog.start()
    listen(slot)
    slot.begin(None)
    try:
        yield
    finally:
        listen(None)
        watchdog.stop()


def working_on(work: Work | None, others: int = 0) -> None:
    """The calling thread begins an item, or work without an item (None); `others` more items cannot be told apart from it.

    Without a listener it does nothing.
    """
    if (heard := listener()) is not None:
        heard.begin(work, others)


@contextmanager
def waiting() -> Iterator[None]:
    """A context in which the calling thread waits for room, or for a service with a time-out of its own; this may last."""
    if (heard := listener()) is None:
        yield
        return
    with heard.waiting():
        yield


def _named(begun: _Begun) -> str:
    if begun.work is None:
        return "what it began"
    named = f"item {begun.work.item.id} of job {begun.work.job.id}"
    return f"{named}, or one of the {begun.others} with it," if begun.others else named
