"""Notes of the model and revision that each queue `<queue>@…` is for, in the hash `pipefleet:revisions`.

Clients that send and workers that consume write a note. Code that counts messages reads the notes, to find every queue of a pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipefleet import foreign
from pipefleet.connection.reading import server_time
from pipefleet.contract.messages import encode_json
from pipefleet.queues.keys import REVISION_MARK, REVISIONS_KEY, base_queue

if TYPE_CHECKING:
    from redis import Redis


_NOTE = "redis.call('PERSIST', KEYS[1]) return redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])"
"""KEYS: revisions. ARGV: queue, note. The first write takes no memory, see `contract.records.NEEDS_NO_MEMORY`."""


def note_revision(redis: Any, queue: str, model: str | None, revision: str | None, *, now: float | None = None) -> None:
    """Note which revision `queue` is for, so that `queues_of` finds it. A pool's own queue needs no note.

    `now` is in seconds since 1970 by the server's clock; without it the server is asked. With `now`, `redis` may be a pipeline.
    """
    if REVISION_MARK in queue:
        at = server_time(redis) if now is None else now
        note = encode_json({"model": model, "revision": revision, "at": at})
        # With its text: in a transaction, NOSCRIPT would lose the note beside messages that are queued.
        redis.eval(_NOTE, 1, REVISIONS_KEY, queue, note)


def known_revisions(redis: Redis) -> dict[str, tuple[str, str | None]]:
    """Model and revision of every queue with a note. Entries that cannot be read are passed over with one warning."""
    entries: Any = redis.hgetall(REVISIONS_KEY)
    found = {}
    for name, value in entries.items():
        try:
            note = foreign.read_object(value)
            known = foreign.names(note, "model", "revision")
            found[foreign.own_queue(name.decode())] = (known["model"] or "", known["revision"])
        except (ValueError, LookupError):
            foreign.passed.say(REVISIONS_KEY, name)
    return found


def queues_of(redis: Redis, queue: str) -> list[str]:
    """Every queue of a pool: its own, which any Celery client may use, and the noted queues of its revisions."""
    base = base_queue(queue)
    known = (name for name in known_revisions(redis) if base_queue(name) == base)
    return list(dict.fromkeys([base, queue, *known]))
