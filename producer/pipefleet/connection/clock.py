"""One clock for the whole fleet: the Redis server's. Deadlines, records and the times of messages are in its time.

So machines agree although their own clocks are wrong, and setting a local clock while a process runs changes nothing. Clients
and workers call `ServerClock`; only its first measurement can fail.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipefleet.forking import renew_after_fork

if TYPE_CHECKING:
    from redis import Redis

REFRESH_SECONDS = 60.0
"""Seconds for which a measurement holds: clocks drift, and the server's clock may be set."""
AGAIN_SECONDS = 5.0
"""Seconds between a measurement that failed and the next try."""
CLOSE_SECONDS = 0.01
"""A measurement with a longer round trip is made again, TRIES times at most. The measurement with the shortest one counts."""
TRIES = 3


class ServerClock:
    """The time of the Redis server, right within half a round trip. Thread-safe.

    The first `now()` asks the server; later one call of `now()` in REFRESH_SECONDS does so. Between these it counts on the
    monotonic clock, which nobody can set.
    """

    def __init__(self, redis: Redis, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._redis: Any = redis
        self._monotonic = monotonic
        self._measuring = threading.Lock()
        self._offset: float | None = None
        self._next = 0.0
        renew_after_fork(self)

    def now(self) -> float:
        """Seconds since 1970 (UTC) by the server's clock.

        Raises redis-py's errors where the first measurement fails. Later, the last measurement goes on to hold.
        """
        if self._offset is None:
            with self._measuring:
                if self._offset is None:
                    self._measure()
        elif self._monotonic() >= self._next and self._measuring.acquire(blocking=False):
            try:
                self._refresh()
            finally:
                self._measuring.release()
        assert self._offset is not None
        return self._monotonic() + self._offset

    def peek(self) -> float:
        """The time without I/O: by the last measurement, of any age, or by the local clock before the first."""
        return time.time() if self._offset is None else self._monotonic() + self._offset

    def after_fork(self) -> None:
        """No thread measures in a child. The last measurement holds."""
        self._measuring = threading.Lock()

    def _refresh(self) -> None:
        from redis.exceptions import RedisError

        self._next = self._monotonic() + AGAIN_SECONDS
        try:
            self._measure()
        except (RedisError, OSError):
            return  # during an outage clocks hardly drift

    def _measure(self) -> None:
        shortest = float("inf")
        for _ in range(TRIES):
            before = self._monotonic()
            seconds, micros = self._redis.time()
            after = self._monotonic()
            if after - before < shortest:
                shortest = after - before
                offset = seconds + micros / 1e6 - (before + after) / 2.0
            if shortest <= CLOSE_SECONDS:
                break
        self._offset, self._next = offset, self._monotonic() + REFRESH_SECONDS
