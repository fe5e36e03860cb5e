"""Dead letters: messages that were given up, in Redis. Here they are filed, listed, removed and queued again.

Workers file them; `pipefleet dead-letters`, the end of a run and the scaler read them. Errors are redis-py's; UsageError says that
a letter cannot be queued again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipefleet.connection.reading import reading, server_time
from pipefleet.connection.scripts import run_script
from pipefleet.contract.messages import MAX_WIRE_BYTES, encode_json
from pipefleet.errors import ContractError, UsageError
from pipefleet.foreign import number, read_object, whole
from pipefleet.queues.celery import TIME_HEADER
from pipefleet.queues.keys import PRIORITY_STEPS, job_key, ledger_keys, queue_lists
from pipefleet.queues.looking import message_id

if TYPE_CHECKING:
    from redis import Redis

MOST_LETTER_BYTES = 8 * MAX_WIRE_BYTES
"""Bytes of the largest letter that is read: the largest message takes so many when it is quoted. A larger letter is only named."""
MOST_READ_BYTES = 16 * 1024 * 1024
"""Bytes of letters that one call reads."""
KILLED = "delivered {} times"
"""The reason of a message that was delivered so often and never ended."""
TOO_LARGE = "too_large"
"""The reason of a message that is too large for any worker begins so."""
FOREIGN = "this message is none of its run's: "
"""The reason of a message begins so if the message names a run and does not agree with it. Nothing of that run was refused."""


def kills(reason: str) -> bool:
    """Whether a reason says that the message killed workers."""
    return reason.startswith("delivered ")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that no worker will run: the reason, the time (server seconds), its queue, its deliveries, and its text."""

    reason: str
    at: float
    queue: str
    deliveries: int
    message: str
    entry: bytes = field(repr=False)
    """The letter as it lies in Redis. It identifies the letter."""

    @classmethod
    def parse(cls, entry: bytes) -> DeadLetter:
        """Read a letter. Any other entry becomes a letter without a message, so that an operator can see and remove it."""
        try:
            value = read_object(entry.decode(errors="replace"), most=MOST_LETTER_BYTES)
            texts = {name: str(value[name]) for name in ("reason", "queue", "message")}
            return cls(**texts, at=number(value["at"]), deliveries=whole(value["deliveries"]), entry=entry)
        except (ValueError, LookupError):
            return cls("this entry is no dead letter", 0.0, "", 0, "", entry)

    @property
    def job_id(self) -> str | None:
        """The id of the job; None if the message does not tell it."""
        return message_id(self.message.encode(errors="replace"))

    @property
    def code(self) -> str:
        """The code with which its job fails: `killed_worker`, `too_large` or `malformed`."""
        if self.reason.startswith(TOO_LARGE):
            return TOO_LARGE
        return "killed_worker" if kills(self.reason) else "malformed"


_READ_LETTERS = """
local start, left, found, bytes = tonumber(ARGV[1]), tonumber(ARGV[2]), {}, 0
for _, key in ipairs(KEYS) do
  local place, size = start, redis.call('LLEN', key)
  start = math.max(0, start - size)
  while place < size and left > 0 and bytes < tonumber(ARGV[4]) do
    local entry = redis.call('LINDEX', key, place)
    local whole = #entry <= tonumber(ARGV[3])
    found[#found + 1] = whole and entry or {redis.sha1hex(entry), #entry}
    bytes = bytes + (whole and #entry or 0)
    place, left = place + 1, left - 1
  end
  if place < size then break end
end
return found
"""
"""KEYS: unreported letters, and the others. ARGV: start, count, most bytes of a letter, of all. Returns each letter; for a letter
that is too large its SHA-1 and its number of bytes. One script, or letters that are filed meanwhile would show twice, or never."""


def rights(queue: str, *, changes: bool = False) -> list[tuple[str, ...]]:
    """The commands that a reader of a queue's dead letters needs; with `changes` also to remove them. For `connection.rights`."""
    key = ledger_keys(queue)["dead_key"]
    return [("LRANGE", key, "0", "-1"), *([("LREM", key, "1", "")] if changes else [])]


def dead_letters(redis: Redis, queue: str, *, start: int = 0, count: int = 100) -> list[DeadLetter]:
    """Up to `count` dead letters of a queue, newest first, without the first `start`.

    Fewer if they have more than MOST_READ_BYTES together, but at least one if there is one. A letter of more than
    MOST_LETTER_BYTES, which only another program writes, stays in Redis: it is shown without its message and can be removed.
    """
    keys = ledger_keys(queue)
    names = (keys["unreported_key"], keys["dead_key"])
    found: Any = run_script(redis, _READ_LETTERS, names, start, count, MOST_LETTER_BYTES, MOST_READ_BYTES)
    return [DeadLetter.parse(one) if isinstance(one, bytes) else _unread(*one) for one in found]


def _unread(digest: bytes, size: int) -> DeadLetter:
    reason = f"{TOO_LARGE}: this dead letter has {size} bytes and is not read; remove it"
    return DeadLetter(reason, 0.0, "", 0, "", _DIGEST + digest)


_DIGEST = b"sha1:"


def every_dead_letter(redis: Redis, queue: str) -> Iterator[DeadLetter]:
    """The dead letters of a queue, newest first, read by the thousand. A letter that is filed meanwhile may show twice."""
    start = 0
    while batch := dead_letters(redis, queue, start=start, count=1000):
        yield from batch
        start += len(batch)


def count_dead_letters(redis: Redis, queue: str) -> int:
    """The number of dead letters of a queue."""
    keys = ledger_keys(queue)
    pipe = reading(redis)  # one transaction, or a letter that moves between the lists would count twice
    pipe.llen(keys["unreported_key"])
    pipe.llen(keys["dead_key"])
    return sum(pipe.execute())


_FILE_LETTER = """
redis.call('PERSIST', KEYS[1])
redis.call('LPUSH', KEYS[1], ARGV[1])
"""
"""KEYS: dead letters. ARGV: letter. The first write takes no memory, see `contract.records.NEEDS_NO_MEMORY`: a full server must
take the letter, or the suspect of this culprit would run again and again, alone each time."""


def file_dead_letter(redis: Redis, queue: str, *, message: str, reason: str, deliveries: int = 0) -> None:
    """Put the text of a message into the dead letters of a queue, also on a full server."""
    entry = {"reason": reason, "at": server_time(redis), "queue": queue, "deliveries": deliveries}
    run_script(redis, _FILE_LETTER, [ledger_keys(queue)["dead_key"]], encode_json({**entry, "message": message}))


_REMOVE_LETTER = """
local digest = string.match(ARGV[1], '^sha1:(%x+)$')
for i = 1, 2 do
  if redis.call('LREM', KEYS[i], 1, ARGV[1]) > 0 then return 1 end
  for place = 0, digest and redis.call('LLEN', KEYS[i]) - 1 or -1 do
    local entry = redis.call('LINDEX', KEYS[i], place)
    if #entry > tonumber(ARGV[2]) and redis.sha1hex(entry) == digest then return redis.call('LREM', KEYS[i], 1, entry) end
  end
end
return 0
"""

_REQUEUE_LETTER = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) + redis.call('LREM', KEYS[2], 1, ARGV[1]) == 0 then return nil end
local state = KEYS[4] and redis.call('HGET', KEYS[4], 'state')
if state == 'succeeded' or state == 'cancelled' then return state end
redis.call('LPUSH', KEYS[3], ARGV[2])
if KEYS[4] then
  redis.call('HDEL', KEYS[4], 'error', 'output', 'output_ref', 'started', 'finished', 'worker', 'timings', 'warnings',
    'loaded')
  redis.call('HSET', KEYS[4], 'state', 'queued', 'queue', ARGV[4])
  redis.call('EXPIRE', KEYS[4], ARGV[3])
end
return 'queued'
"""
"""KEYS: dead letters, unreported letters, list of the queue, record of a single job or none. ARGV: letter, message, ttl, queue."""


def remove_dead_letter(redis: Redis, letter: DeadLetter, queue: str) -> bool:
    """Remove a dead letter. False when it was gone already."""
    keys = ledger_keys(queue)
    return bool(
        run_script(redis, _REMOVE_LETTER, [keys["dead_key"], keys["unreported_key"]], letter.entry, MOST_LETTER_BYTES)
    )


def requeue_dead_letter(
    redis: Redis, letter: DeadLetter, queue: str, *, ttl: float = 86_400.0, shard: bool = False
) -> str | None:
    """Queue the message of a dead letter once more, behind the others. Its deliveries are counted anew.

    A single job has a record, which says `queued` again and is kept for `ttl` seconds; a `shard` has none. The caller knows from
    the body which it is. Returns `queued`; `succeeded` or `cancelled` if the job ended so elsewhere, and then only the letter is
    removed; None if the letter was gone. Raises UsageError for a message that no worker could read.
    """
    keys = ledger_keys(queue)
    own = letter.queue if letter.queue and ledger_keys(letter.queue) == keys else queue
    try:
        message = json.loads(letter.message)
        step = message["properties"].get("priority") or 0
        target = queue_lists(own)[max(place for place, bound in enumerate(PRIORITY_STEPS) if bound <= step)]
        record = [] if shard else [job_key(message["headers"]["id"])]
        # A worker that was told to revoke a job drops older messages of the job: this message is queued now.
        text = encode_json({**message, "headers": {**message["headers"], TIME_HEADER: server_time(redis)}})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ContractError):
        raise UsageError("this dead letter is not a message that can be queued; remove it") from None
    names = (keys["dead_key"], keys["unreported_key"], target, *record)
    became: Any = run_script(redis, _REQUEUE_LETTER, names, letter.entry, text, int(ttl), own)
    return None if became is None else became.decode()
