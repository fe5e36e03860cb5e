"""Retries of redis-py that end with the time of one answer, however many of them are inside of each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis.backoff import ExponentialBackoff
from redis.retry import Retry

_T = TypeVar("_T")
RETRIES = 2
"""A connection that was cut or refused is tried again so often."""


class BoundedRetry(Retry):
    """Tries again while `seconds` have not passed since the first try.

    A command, the connection that it opens and the health check of that connection each retry by themselves: with a server that
    hangs, three time-outs in each would make a minute and more of ten seconds.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(ExponentialBackoff(cap=1.0, base=0.05), RETRIES)
        self._seconds = seconds

    def call_with_retry(self, do: Callable[[], _T], fail: Callable[..., Any], *args: Any, **options: Any) -> _T:
        """As redis-py's; raises the last error once the time is over."""
        began = time.monotonic()

        def failed(error: Exception, *count: int) -> None:
            fail(error, *count)
            if time.monotonic() - began >= self._seconds:
                raise error

        return super().call_with_retry(do, failed, *args, **options)
