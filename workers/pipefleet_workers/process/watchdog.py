"""The watchdog: work on an item that does not end within its time ends the process, since nothing inside it can.

Each thread that works has a slot. The thread says which item it begins (`working_on`), which is a sign of life, and that it waits
for room or for a service (`waiting`), which may last. One thread looks at all slots. Its message names stage, job and item, and
the job is delivered again: one that does so each time is found out as any other that kills its workers.

Code that never lets go of Python's lock, such as a regular expression that backtracks for ever, stops the watchdog as well. Then
`faulthandler`, which needs no lock, prints where every thread is and ends the process with code 1.
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
"""How often it looks within the shortest time that work may take."""
LOCKED_SECONDS = 120.0
"""For so long at least, or twice the longest time that work may take, Python's lock may be held in one piece."""


class _Begun(NamedTuple):
    """A new one for each sign of life."""

    work: Work | None
    others: int


class Listener(Protocol):
    """Who hears what one thread works on."""

    def begin(self, work: Work | None, others: int = 0) -> None:
        """The thread begins an item, with `others` that it cannot tell apart from it."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside may last."""
        yield


class Slot:
    """What one thread works on: written by this thread, read by the watchdog's."""

    def __init__(self, stage: str, seconds: float, code: int) -> None:
        self.stage = stage
        self.seconds = seconds
        self.code = code
        self.begun: _Begun | None = None
        self.seen: _Begun | None = None
        """What the watchdog saw at its last look, and for how many seconds."""
        self.unchanged = 0.0

    def begin(self, work: Work | None, others: int = 0) -> None:
        """The thread begins an item, with `others` that it cannot tell apart from it."""
        self.begun = _Begun(work, others)

    def tick(self) -> None:
        """A sign of life from inside the work: its time starts anew."""
        if self.begun is not None:
            self.begun = _Begun(*self.begun)

    def rest(self) -> None:
        """Nothing is under way."""
        self.begun = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside may last: it waits for others."""
        before, self.begun = self.begun, None
        try:
            yield
        finally:
            self.begun = None if before is None else _Begun(*before)

    def look(self, passed: float) -> str | None:
        """What to say of the thread if it hangs, `passed` seconds after the look before. By the watchdog's thread alone."""
        begun = self.begun
        self.unchanged = self.unchanged + passed if begun is self.seen and begun is not None else 0.0
        self.seen = begun
        if begun is None or self.unchanged < self.seconds:
            return None
        return f"stage {self.stage} has not ended {_named(begun)} within {self.seconds:.0f} s"


class Watchdog:
    """Watches the slots of all threads. `on_hang(code, reason)` is called once, from the watchdog's own thread."""

    def __init__(self, on_hang: Callable[[int, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_hang = on_hang
        self._clock = clock
        self._looked = clock()
        self._slots: list[Slot] = []
        self._service = Service("watchdog", self._watch)

    def slot(self, stage: str, seconds: float, code: int = HUNG_STAGE) -> Slot:
        """A slot for one thread, whose work on an item may take `seconds`. Before `start`."""
        self._slots.append(Slot(stage, seconds, code))
        return self._slots[-1]

    def start(self) -> None:
        """Begin to watch; the thread ends by itself when it has found what hangs."""
        self._arm()  # here: a thread that holds Python's lock from now on would keep the watchdog's from doing it
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Cease to watch. Whether its thread has ended within `timeout` seconds."""
        ended = self._service.stop(timeout)
        faulthandler.cancel_dump_traceback_later()
        return ended

    def join(self, timeout: float | None = None) -> bool:
        """Wait until it has found what hangs. Whether that came within `timeout` seconds."""
        return self._service.join(timeout)

    def look(self) -> bool:
        """Look at every slot; whether all is well.

        A process that was stopped and goes on, or a machine that slept, is not hung: such a gap counts for little.
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
        """End the process if this is not called again in time."""
        seconds = max(LOCKED_SECONDS, 2 * max((slot.seconds for slot in self._slots), default=0.0))
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


_thread = threading.local()


def listen(listener: Listener) -> None:
    """Let `listener` hear from now on what the calling thread works on."""
    _thread.listener = listener


def working_on(work: Work, others: int = 0) -> None:
    """The calling thread begins an item, with `others` that it cannot tell apart from it; nobody hears of it in most threads."""
    listener: Listener | None = getattr(_thread, "listener", None)
    if listener is not None:
        listener.begin(work, others)


@contextmanager
def waiting() -> Iterator[None]:
    """What the calling thread does inside may last: it waits for room, or for a service that has a time-out of its own."""
    listener: Listener | None = getattr(_thread, "listener", None)
    if listener is None:
        yield
        return
    with listener.waiting():
        yield


def _named(begun: _Begun) -> str:
    if begun.work is None:
        return "what it began"
    named = f"item {begun.work.item.id} of job {begun.work.job.id}"
    return f"{named}, or one of the {begun.others} with it," if begun.others else named
