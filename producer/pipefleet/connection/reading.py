"""Reading from Redis: many commands in one transaction, and the server's clock. Raises redis-py's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipefleet.connection import answers

if TYPE_CHECKING:
    from redis import Redis


def server_time(redis: Redis) -> float:
    """Seconds since 1970 by the clock of the Redis server. All parts of a fleet share this clock."""
    seconds, micros = list(redis.time())
    return int(seconds) + int(micros) / 1e6


class Reading:
    """Commands that only read. `execute` sends them in one transaction and returns their answers.

    A full server of Redis before 7.2 queues no command of a transaction, not even a read. There the commands go one by one.
    """

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._commands: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self._commands.append((name, args, kwargs))

    def execute(self) -> list[Any]:
        """The answers, in order. Raises redis-py's errors."""
        from redis.exceptions import ResponseError

        try:
            return self._send(transaction=True)
        except ResponseError as error:
            if answers.word_of(error) != answers.FULL:
                raise
            return self._send(transaction=False)

    def _send(self, *, transaction: bool) -> list[Any]:
        pipe = self._redis.pipeline(transaction=transaction)
        for name, args, kwargs in self._commands:
            getattr(pipe, name)(*args, **kwargs)
        return list(pipe.execute())


def reading(redis: Any) -> Any:
    """A `Reading` that takes commands as a pipeline of redis-py does."""
    return Reading(redis)
