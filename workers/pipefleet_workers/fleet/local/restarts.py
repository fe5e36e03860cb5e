"""When a process that ended by itself is started again: after growing pauses, and rarely once it has ended too often.

died ─▶ pause (doubles) ─▶ due ─▶ started ─┬▶ ready for STEADY_SECONDS ─▶ deaths = 0
                                           └▶ died; at MOST_DEATHS in a row: parked, started every PARKED_SECONDS

`Crew` keeps one `Restarts` for each worker, reports deaths to it, and asks it when to start the worker again. No I/O, no errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST_PAUSE = 60.0
MOST_DEATHS = 8
"""Deaths in a row after which a process is parked. The pauses before add up to two minutes: a hub or a disk may come back."""
STEADY_SECONDS = 300.0
"""A process that was ready for so long has overcome the reason of its deaths."""
PARKED_SECONDS = 600.0
"""Seconds between two starts of a parked process."""


class Restarts:
    """The deaths of one process, and their consequences. One thread at a time may call it.

    `clock` gives monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due_at: float | None = None
        self._ready_since: float | None = None
        self.deaths = 0
        """Deaths in a row; 0 after STEADY_SECONDS of being ready."""
        self.parked = False
        """Whether the process has ended MOST_DEATHS times in a row and has not been ready since."""

    @property
    def waiting(self) -> bool:
        """Whether the process has ended and was not started since."""
        return self._due_at is not None

    @property
    def due(self) -> bool:
        """Whether it is time to start the process again."""
        return self._due_at is not None and self._clock() >= self._due_at

    def died(self) -> float:
        """Note that the process has ended. Returns the seconds until it is due."""
        self._ready_since = None
        self.deaths += 1
        self.parked = self.deaths >= MOST_DEATHS
        pause = PARKED_SECONDS if self.parked else min(LONGEST_PAUSE, 2.0 ** (self.deaths - 1))
        self._due_at = self._clock() + pause
        return pause

    def started(self) -> None:
        """Note that the process was started again."""
        self._due_at = None

    def ready(self) -> bool:
        """Note that the process is ready; call it again and again while it is. True if it was parked until now."""
        now = self._clock()
        self._ready_since = now if self._ready_since is None else self._ready_since
        if now - self._ready_since >= STEADY_SECONDS:
            self.deaths = 0
        was_parked, self.parked = self.parked, False
        return was_parked

    def forgive(self) -> None:
        """Forget the deaths; a process that waits is due at once."""
        self.deaths = 0
        self.parked = False
        if self._due_at is not None:
            self._due_at = self._clock()
