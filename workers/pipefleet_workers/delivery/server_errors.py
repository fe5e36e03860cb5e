"""What an error that the server answers means to Celery: wait and connect again, or go on without what it was about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep

from redis.exceptions import AuthorizationError, NoPermissionError, ResponseError
from redis.exceptions import ConnectionError as NoConnectionError

from pipefleet.connection.answers import FULL, word_of

__all__ = ["FULL", "is_no_list", "retried", "retrying", "word_of"]
REFUSED_SECONDS = 1.0
"""How long a worker waits after an answer of a server that cannot serve now; Celery itself connects again at once."""


def is_no_list(error: ResponseError) -> bool:
    """Whether a key holds something else than a list, so that the other lists are served without it."""
    return "WRONGTYPE" in str(error)


def retried(error: ResponseError) -> Exception:
    """A server that is full, read-only or loading is waited for like one that is away; a refused right is an error."""
    if isinstance(error, NoPermissionError | AuthorizationError):
        return error
    sleep(REFUSED_SECONDS)
    return NoConnectionError(f"Redis cannot serve messages now: {error}")


@contextmanager
def retrying(*, unless_full: bool = False) -> Iterator[None]:
    """Let Celery connect again after an answer of a server that cannot serve now; `unless_full`, pass over one that is full."""
    try:
        yield
    except ResponseError as error:
        if not (unless_full and word_of(error) == FULL):
            raise retried(error) from error
