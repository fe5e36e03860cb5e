"""Retries of redis-py that end after the time of one answer. `connect` gives them to every client.

redis-py nests retries: a command, the connection that it opens and the health check of that connection each try again. Here all
of them together end after `seconds`.
"""

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
"""How often a connection that was cut or refused is tried again."""


class _WrongServer(NoConnectionError):
    """A replica refused a command. redis-py closes the connection and sends the command once more through a new one."""

    def __init__(self, answer: ResponseError) -> None:
        super().__init__("a replica answered")
        self.answer = answer


class BoundedRetry(Retry):
    """Tries again until `seconds` have passed since the first try, and once more after the refusal of a replica.

    With a server that hangs, three time-outs in each of the nested retries would make more than a minute of ten seconds. A
    command that a replica refused had no effect, and after a failover the address of an old connection leads to the primary.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(ExponentialBackoff(cap=1.0, base=0.05), RETRIES)
        self._seconds = seconds

    def call_with_retry(self, do: Callable[[], _T], fail: Callable[..., Any], *args: Any, **options: Any) -> _T:
        """As redis-py's method; raises the last error once the time is over."""
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
    """`do`, changed: its first refusal by a replica becomes an error that is retried."""
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
