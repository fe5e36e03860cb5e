"""The doctor's check of the Redis hashes in which workers announce themselves: it finds entries that pipefleet did not write.

`report` calls it. It returns a sentence if every entry can be read. It raises PipefleetError, with the command that
removes an entry, if one cannot be read, and ServiceUnavailableError if Redis is away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipefleet import foreign
from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import read_pool, read_worker
from pipefleet.printable import printable
from pipefleet.queues.keys import PARKED_KEY, POOLS_KEY, REVISIONS_KEY, WORKERS_KEY
from pipefleet.settings import Settings

SHOWN = 5
"""The message names at most so many entries of a hash."""
Readable = Callable[[bytes, bytes], bool]


def check_entries(settings: Settings) -> str:
    """A sentence if every entry can be read. Raises PipefleetError with the unreadable entries and the way to remove them."""
    redis: Any = connect(settings)
    found = []
    with redis_errors(settings.redis_url):
        for key, is_readable in _HASHES.items():
            names = [field for field, value in redis.hgetall(key).items() if not is_readable(field, value)]
            found += [_told(key, names)] if names else []
    if found:
        raise PipefleetError(f"{'; '.join(found)}. They are passed over; remove each with `redis-cli HDEL KEY ENTRY`")
    return "what workers tell of themselves can be read"


def _told(key: str, names: list[bytes]) -> str:
    shown = ", ".join(repr(printable(one.decode(errors="replace"))) for one in sorted(names)[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{key} has entries that pipefleet did not write: {shown}{more}"


def _is_revision(field: bytes, value: bytes) -> bool:
    try:
        foreign.own_queue(field.decode())
        return bool(foreign.names(foreign.read_object(value), "model", "revision"))
    except ValueError:
        return False


def _is_object(field: bytes, value: bytes) -> bool:
    try:
        foreign.name(field.decode())
        return bool(foreign.read_object(value))
    except ValueError:
        return False


_HASHES: dict[str, Readable] = {
    POOLS_KEY: lambda field, value: read_pool(field, value) is not None,
    WORKERS_KEY: lambda field, value: read_worker(field, value) is not None,
    REVISIONS_KEY: _is_revision,
    PARKED_KEY: _is_object,
}
