"""Waiting for a service that is away: bounded in time, with growing pauses and jitter, and ended at once by a stop event.

Planners, handles and workers wrap their calls in `Patience.call`. Only retryable errors are waited for; the last one is raised.
"""

from __future__ import annotations

import itertools
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from pipefleet.errors import PipefleetError, ResultTimeoutError

_T = TypeVar("_T")
LONGEST_PAUSE = 20.0
_NEVER = threading.Event()
"""The stop event of callers without one; nobody sets it. Each submitted job makes two objects of Patience, and an event takes
longer to make than they do."""
PATIENCE_SECONDS = 300.0
"""Seconds for which a planner, or a caller that waits for results, goes on while Redis or S3 is away."""


def pause(attempt: int, *, first: float = 0.5, longest: float = LONGEST_PAUSE) -> float:
    """Seconds before the next try after `attempt` (from 0): `first`, doubled each time up to `longest`, with jitter."""
    return random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(attempt, 30))


class Patience:
    """Repeats calls that fail with a retryable error, each for at most `seconds`, until `stopped` is set. Thread-safe.

    The pauses grow up to `longest` seconds. Before each pause `told` is called with the error; it may raise.
    """

    def __init__(
        self,
        stopped: threading.Event | None = None,
        *,
        seconds: float = 0.0,
        longest: float = LONGEST_PAUSE,
        told: Callable[[PipefleetError], object] = lambda error: None,
    ) -> None:
        self._stopped = stopped or _NEVER
        self._told = told
        self._longest = longest
        self.seconds = seconds

    def call(self, function: Callable[[], _T], *, until: float = math.inf) -> _T:
        """The result of `function`. Raises an error that is not retryable at once, and a retryable error when time is up.

        Time is up at `until` at the latest, in seconds of the monotonic clock. ResultTimeoutError is never waited for.
        """
        deadline: float | None = None
        for attempt in itertools.count():
            try:
                return function()
            except PipefleetError as error:
                now = time.monotonic()
                deadline = min(until, now + self.seconds) if deadline is None else deadline
                if not is_outage(error) or now >= deadline:
                    raise
                self._told(error)
                if self._stopped.wait(min(pause(attempt, longest=self._longest), deadline - now)):
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def each(self, items: Callable[[int], Iterator[_T]]) -> Iterator[_T]:
        """The items of an iterator that may fail when a service is away; `items(count)` opens it again after the first `count`."""
        read = 0
        rest: Iterator[_T] | None = None

        def following() -> _T | None:
            nonlocal rest
            rest = items(read) if rest is None else rest
            try:
                return next(rest, None)
            except PipefleetError:
                rest = None
                raise

        while (item := self.call(following)) is not None:
            read += 1
            yield item


def is_outage(error: PipefleetError) -> bool:
    """Whether the error says that a service is away: then the same call may succeed later."""
    return error.retryable and not isinstance(error, ResultTimeoutError)


def within(seconds: float, function: Callable[[], _T]) -> _T:
    """The result of `function`. Raises TimeoutError after `seconds`; then the call goes on in a thread that nobody waits for."""
    answered: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answered.put((True, function()))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            answered.put((False, error))

    # No service: it ends with its call, which nothing can stop.
    threading.Thread(target=run, name="pipefleet-within", daemon=True).start()
    try:
        done, value = answered.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise TimeoutError from None
    if not done:
        raise value
    return cast("_T", value)
