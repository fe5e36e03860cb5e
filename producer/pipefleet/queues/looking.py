"""Looking into a queue: the number of its messages by priority and place, and the ids of their jobs.

Callers are `pipefleet queues`, the backlog of a run, the scaler and `up`. Nothing changes. Raises redis-py's errors.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipefleet.queues.keys import PRIORITY_STEPS, ledger_keys, waiting_lists
from pipefleet.queues.revision_notes import queues_of

if TYPE_CHECKING:
    from redis import Redis


def queued_ids(redis: Redis, queue: str) -> Iterator[str]:
    """Ids of a pool's jobs, of every revision, that wait, are with a worker or are delayed.

    They come in no order, read by the thousand.
    """
    lists = zip(*map(waiting_lists, queues_of(redis, queue)), strict=True)
    for name in itertools.chain(*lists):
        start = 0
        while batch := _all(redis.lrange(name, start, start + 999)):
            yield from _ids(batch)
            start += len(batch)
    for _, raw in redis.hscan_iter(ledger_keys(queue)["unacked_key"], count=1000):
        yield from _ids([raw])


def _all(value: Any) -> list[bytes]:
    return list(value)


def _ids(raw_messages: Iterable[bytes]) -> Iterator[str]:
    for raw in raw_messages:
        try:
            message = json.loads(raw)
            message = message[0] if isinstance(message, list) else message
            yield str(message["headers"]["id"])
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # another program's message; the worker that meets it will say so


def message_id(raw: bytes) -> str | None:
    """The id of the job in a raw message; None for a message of another program."""
    return next(_ids([raw]), None)


def queue_depth(redis: Redis, queue: str) -> Mapping[str, int]:
    """The numbers of a pool's messages that wait, by priority, are with workers (`unacked`), or wait for a retry (`delayed`).

    All revisions count together; `pipefleet.fleet.revisions` counts each by itself.
    """
    keys = ledger_keys(queue)
    pipe = redis.pipeline(transaction=False)
    for name in (name for one in queues_of(redis, queue) for name in waiting_lists(one)):
        pipe.llen(name)
    pipe.hlen(keys["unacked_key"])
    pipe.zcard(keys["delayed_key"])
    *lengths, unacked, delayed = pipe.execute()
    return {**by_priority(lengths), "unacked": max(0, unacked - delayed), "delayed": delayed}


def by_priority(lengths: Sequence[int]) -> dict[str, int]:
    """The lengths of lists, summed by priority. The lists are `queue_lists` or `waiting_lists` of one or more queues, in order."""
    high, normal, middle, low = (sum(lengths[step :: len(PRIORITY_STEPS)]) for step in range(len(PRIORITY_STEPS)))
    return {"high": high, "normal": normal + middle, "low": low}
