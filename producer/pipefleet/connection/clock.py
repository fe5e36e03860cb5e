"""One clock for the whole fleet: the Redis server's. Deadlines, records and the times of messages are told in it.

Machines whose own clocks are wrong agree in this way, and a local clock that is set while a process runs changes nothing.
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
"""How long a measurement holds: clocks drift, and the server's may be set."""
AGAIN_SECONDS = 5.0
"""How long after a measurement that failed the next one is tried."""
CLOSE_SECONDS = 0.01
"""A measurement whose round trip took longer is made again, TRIES times at most; the shortest one counts."""
TRIES = 3


class ServerClock:
    """The time of the Redis server, right within half a round trip. Thread-safe.

    It asks the server at the first `now()` and then once in REFRESH_SECONDS, in the call that happens to come; between these it
    counts on the monotonic clock, which nobody can set.
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

        Raises redis-py's errors where the server cannot be asked the first time; later the last measurement goes on to hold.
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
        """As `now`, but asks nobody: by the last measurement, however old, or by the local clock where there was none."""
        return time.time() if self._offset is None else self._monotonic() + self._offset

    def after_fork(self) -> None:
        """Nobody is measuring in a child; what was measured holds."""
        self._measuring = threading.Lock()

    def _refresh(self) -> None:
        from redis.exceptions import RedisError

        self._next = self._monotonic() + AGAIN_SECONDS
        try:
            self._measure()
        except (RedisError, OSError):
            return  # an outage: clocks hardly drift while it lasts

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
