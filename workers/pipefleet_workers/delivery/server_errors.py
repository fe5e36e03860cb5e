"""Sorts error replies of the Redis server into Celery's two cases: wait and connect again, or go on without the failed step.

`transport` wraps its calls with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

from redis.exceptions import AuthorizationError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as NoConnectionError

from pipefleet.connection.answers import FULL, word_of

__all__ = ["FULL", "is_no_list", "retried", "retrying", "word_of"]
REFUSED_SECONDS = 1.0
"""A worker waits this long after a server replies that it cannot serve now; Celery itself connects again at once."""


def is_no_list(error: ResponseError) -> bool:
    """Whether the key of a list holds another type. The caller then serves the other lists."""
    return "WRONGTYPE" in str(error)


def retried(error: ResponseError) -> Exception:
    """The error that Celery should see. A server that is full, read-only or loading counts as away; a missing right is an error."""
    if isinstance(error, NoPermissionError | AuthorizationError):
        return error
    sleep(REFUSED_SECONDS)
    return NoConnectionError(f"Redis cannot serve messages now: {error}")


@contextmanager
def retrying(*, unless_full: bool = False) -> Iterator[None]:
    """Let Celery connect again when a server replies that it cannot serve now. With `unless_full`, ignore a full server."""
    try:
        yield
    except ResponseError as error:
        if not (unless_full and word_of(error) == FULL):
            raise retried(error) from error
