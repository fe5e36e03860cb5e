"""Retries of redis-py that end with the time of one answer, however many of them are inside of each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as NoConnectionError
from redis.exceptions import ResponseError
from redis.retry import Retry

from pipefleet.connection.answers import is_of_replica, word_of

_T = TypeVar("_T")
RETRIES = 2
"""A connection that was cut or refused is tried again so often."""


class _WrongServer(NoConnectionError):
    """A replica refused a command: the connection is closed, and the command is sent once more through a new one."""

    def __init__(self, answer: ResponseError) -> None:
        super().__init__("a replica answered")
        self.answer = answer


class BoundedRetry(Retry):
    """Tries again while `seconds` have not passed since the first try, and once more after the refusal of a replica.

    A command, the connection that it opens and the health check of that connection each retry by themselves: with a server that
    hangs, three time-outs in each would make a minute and more of ten seconds. A replica did nothing of what it refused, and
    after a failover the address of an old connection leads to the primary.
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

        try:
            return super().call_with_retry(_once_more(do), failed, *args, **options)
        except _WrongServer as error:
            raise error.answer from None


def _once_more(do: Callable[[], _T]) -> Callable[[], _T]:
    """`do`, whose first refusal by a replica is an error that is retried."""
    refused = False

    def call() -> _T:
        nonlocal refused
        try:
            return do()
        except ResponseError as error:
            if refused or not is_of_replica(word_of(error)):
                raise
            refused = True
            raise _WrongServer(error) from None

    return call
