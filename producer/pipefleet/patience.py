"""Waiting for a service that is away: bounded, with growing pauses and jitter, and given up at once when told to stop."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipefleet.errors import PipefleetError

_T = TypeVar("_T")
LONGEST_PAUSE = 20.0


def pause(attempt: int, *, first: float = 0.5, longest: float = LONGEST_PAUSE) -> float:
    """Seconds before the next try after `attempt` (from 0): doubled each time up to `longest`, with jitter."""
    return random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(attempt, 30))


class Patience:
    """Repeats calls that fail with a retryable error, each for at most `seconds`, until `stopped` is set. Thread-safe."""

    def __init__(self, stopped: threading.Event, *, seconds: float = 0.0) -> None:
        self._stopped = stopped
        self.seconds = seconds

    def call(self, function: Callable[[], _T]) -> _T:
        """What `function` returns. Raises its last error: one that is not retryable at once, another when time is up."""
        deadline: float | None = None
        for attempt in itertools.count():
            try:
                return function()
            except PipefleetError as error:
                now = time.monotonic()
                deadline = now + self.seconds if deadline is None else deadline
                if not error.retryable or now >= deadline or self._stopped.wait(pause(attempt)):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")
