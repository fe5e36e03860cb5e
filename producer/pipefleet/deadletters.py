"""Messages that were given up, and those that workers hold, as an operator sees them. In Redis; raises what redis-py raises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipefleet.broker import (
    PRIORITY_STEPS,
    SHARD_HEADER,
    TIME_HEADER,
    job_key,
    message_id,
    queue_lists,
    server_time,
    unacked_keys,
)
from pipefleet.contract import encode_json
from pipefleet.errors import ContractError, UsageError
from pipefleet.foreign import number, read_object, whole

if TYPE_CHECKING:
    from redis import Redis


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that no worker will run: why, when (server seconds), its queue, its deliveries, and its text."""

    reason: str
    at: float
    queue: str
    deliveries: int
    message: str
    entry: bytes = field(repr=False)
    """The letter as it lies in Redis, which tells it from any other."""

    @classmethod
    def parse(cls, entry: bytes) -> DeadLetter:
        """Read a letter; what is not one becomes a letter without a message, so that it can be seen and removed."""
        try:
            value = read_object(entry.decode(errors="replace"))
            texts = {name: str(value[name]) for name in ("reason", "queue", "message")}
            return cls(**texts, at=number(value["at"]), deliveries=whole(value["deliveries"]), entry=entry)
        except (ValueError, LookupError):
            return cls("this entry is no dead letter", 0.0, "", 0, "", entry)

    @property
    def job_id(self) -> str | None:
        """The id of the job, or None when the message does not tell."""
        return message_id(self.message.encode(errors="replace"))

    @property
    def code(self) -> str:
        """The code that its job fails with: `killed_worker` or `malformed`."""
        return "killed_worker" if self.reason.startswith("delivered ") else "malformed"


def dead_letters(redis: Redis, queue: str, *, start: int = 0, count: int = 100) -> list[DeadLetter]:
    """Up to `count` dead letters of a queue, newest first, after leaving out `start`."""
    keys = unacked_keys(queue)
    pipe = redis.pipeline(transaction=True)  # or letters that are filed meanwhile would show twice, or not
    pipe.lrange(keys["unreported_key"], 0, -1)
    pipe.lrange(keys["dead_key"], 0, start + count - 1)
    unreported, filed = pipe.execute()
    return [DeadLetter.parse(entry) for entry in (unreported + filed)[start : start + count]]


def every_dead_letter(redis: Redis, queue: str) -> Iterator[DeadLetter]:
    """The dead letters of a queue, newest first; reads a thousand at a time, so that one filed meanwhile may show twice."""
    start = 0
    while batch := dead_letters(redis, queue, start=start, count=1000):
        yield from batch
        start += len(batch)


def count_dead_letters(redis: Redis, queue: str) -> int:
    """How many dead letters a queue has."""
    keys = unacked_keys(queue)
    pipe = redis.pipeline(transaction=True)  # or letters that are filed meanwhile would count twice
    pipe.llen(keys["unreported_key"])
    pipe.llen(keys["dead_key"])
    return sum(pipe.execute())


def file_dead_letter(redis: Redis, queue: str, *, message: str, reason: str, deliveries: int = 0) -> None:
    """Put the text of a message to the dead letters of a queue."""
    entry = {"reason": reason, "at": server_time(redis), "queue": queue, "deliveries": deliveries}
    redis.lpush(unacked_keys(queue)["dead_key"], encode_json({**entry, "message": message}))


_REMOVE_LETTER = """
for i = 1, 2 do
  if redis.call('LREM', KEYS[i], 1, ARGV[1]) > 0 then return 1 end
end
return 0
"""

_REQUEUE_LETTER = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) + redis.call('LREM', KEYS[2], 1, ARGV[1]) == 0 then return nil end
local state = KEYS[4] and redis.call('HGET', KEYS[4], 'state')
if state == 'succeeded' or state == 'cancelled' then return state end
redis.call('LPUSH', KEYS[3], ARGV[2])
if KEYS[4] then
  redis.call('HDEL', KEYS[4], 'error', 'output', 'output_ref', 'started', 'finished', 'worker', 'timings')
  redis.call('HSET', KEYS[4], 'state', 'queued', 'queue', ARGV[4])
  redis.call('EXPIRE', KEYS[4], ARGV[3])
end
return 'queued'
"""
"""KEYS: dead letters, those not reported, list of the queue, record of a single job or none. ARGV: letter, message, ttl, queue."""


def remove_dead_letter(redis: Redis, letter: DeadLetter, queue: str) -> bool:
    """Throw a dead letter away; False when it was gone already."""
    keys = unacked_keys(queue)
    return bool(redis.eval(_REMOVE_LETTER, 2, keys["dead_key"], keys["unreported_key"], letter.entry))


def requeue_dead_letter(redis: Redis, letter: DeadLetter, queue: str, *, ttl: float = 86_400.0) -> str | None:
    """Queue the message of a dead letter once more, behind the others, its deliveries counted anew.

    The record of a single job says `queued` again then, and is kept for `ttl` seconds. Returns `queued`; `succeeded` or `cancelled`
    where the job ended so elsewhere, and only the letter goes; None when that was gone. Raises UsageError for a message that no
    worker could read.
    """
    keys = unacked_keys(queue)
    own = letter.queue if letter.queue and unacked_keys(letter.queue) == keys else queue
    try:
        message = json.loads(letter.message)
        step = message["properties"].get("priority") or 0
        target = queue_lists(own)[max(place for place, bound in enumerate(PRIORITY_STEPS) if bound <= step)]
        record = [] if message["headers"].get(SHARD_HEADER) else [job_key(message["headers"]["id"])]
        # A worker that was told to revoke a job drops its messages of before: this one is queued now.
        text = encode_json({**message, "headers": {**message["headers"], TIME_HEADER: server_time(redis)}})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ContractError):
        raise UsageError("this dead letter is not a message that can be queued; remove it") from None
    names = (keys["dead_key"], keys["unreported_key"], target, *record)
    became: Any = redis.eval(_REQUEUE_LETTER, len(names), *names, letter.entry, text, int(ttl), own)
    return None if became is None else became.decode()


@dataclass(frozen=True, slots=True)
class LeasedMessage:
    """A message that is with a worker."""

    tag: str
    job_id: str | None
    owner: str
    """Host, process, a random part and a number, with colons between."""
    seconds: float
    """How long the worker has had it."""
    renewed_seconds: float
    """How long ago its lease was renewed."""
    deliveries: int


def leased_messages(redis: Redis, queue: str) -> list[LeasedMessage]:
    """The messages that workers of the lease transport hold, longest held first."""
    keys = unacked_keys(queue)
    pipe = redis.pipeline(transaction=True)
    pipe.time()
    for name in ("owners_key", "deliveries_key", "unacked_key"):
        pipe.hgetall(keys[name])
    pipe.zrange(keys["unacked_index_key"], 0, -1, withscores=True)
    (seconds, micros), owners, deliveries, messages, renewed = pipe.execute()
    now, scores = seconds + micros / 1e6, dict(renewed)
    found = []
    for tag, value in owners.items():
        owner, _, since = value.decode(errors="replace").rpartition("@")
        job_id = message_id(messages.get(tag, b""))
        ages = (now - _number(since, now), now - scores.get(tag, now))
        count = int(_number(deliveries.get(tag, 0), 0))
        found.append(LeasedMessage(tag.decode(errors="replace"), job_id, owner, *ages, count))
    return sorted(found, key=lambda one: -one.seconds)


def _number(value: Any, otherwise: float) -> float:
    try:
        return number(value)
    except ValueError:
        return otherwise
