"""redis-py's errors become errors of this package, each with one sentence without credentials.

Every caller of Redis wraps its commands in `redis_errors`, which raises ServiceUnavailableError, ServiceFullError or UsageError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipefleet.connection import answers
from pipefleet.connection.rights import ROLES, refused_command
from pipefleet.connection.wrong_type import wrong_type
from pipefleet.errors import ServiceFullError, ServiceUnavailableError, UsageError
from pipefleet.settings import without_credentials


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn redis-py's errors inside of the block into ServiceUnavailableError, which names the URL without credentials.

    A server at `maxmemory` gives ServiceFullError. A node of a Redis Cluster gives UsageError, as does a database that the server
    does not have.
    """
    from redis.exceptions import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        word, place = answers.word_of(error), without_credentials(url)
        if answers.is_of_cluster(word):
            raise UsageError(f"Redis at {place} {answers.CLUSTER}") from None
        if word == answers.NO_DATABASE:
            raise UsageError(f"Redis at {place} {answers.DATABASE}") from None
        kind = ServiceFullError if word == answers.FULL else ServiceUnavailableError
        raise kind(_explained(error, word, place)) from None


_REFUSED = {
    "AuthenticationError": "refuses access ({name}); check the password in PIPEFLEET_REDIS_URL",
}


def _explained(error: Exception, word: str | None, url: str) -> str:
    """One sentence. It leaves the server's own words out: they may repeat the command's arguments."""
    from redis.exceptions import ConnectionError as NoConnectionError
    from redis.exceptions import TimeoutError as NoAnswerError

    if trouble := wrong_type(error):
        return f"Redis at {url} cannot be used: {trouble}"
    name = type(error).__name__
    command = refused_command(error)
    if command is not None:
        right = f"the right to run {command}" if command else "a right that this needs"
        return f"Redis at {url} refuses access ({name}): its user lacks {right}; see the roles in {ROLES}"
    refused = next((_REFUSED[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _REFUSED), None)
    if known := answers.sentence_of(word) or refused:
        return f"Redis at {url} {known.format(name=name)}"
    if isinstance(error, NoConnectionError | NoAnswerError | OSError):
        return f"cannot reach Redis at {url} ({name}); start one with `pipefleet up`, or set PIPEFLEET_REDIS_URL"
    return f"Redis at {url} answered with an error ({name}); see its log, and `pipefleet doctor`"
