"""Refused shards, which no worker will run: they are noted, their run ends without them, and they can be taken up again.

    dead letter ─▶ note: run:<id>:refused, then _run/refused/    the run goes on, and says so
                   seal: a part in which every item failed       when nothing else of the run is left to do
                   take up: letter, note and sealed part go      the shard is missing again, and queued

The part decides the fate of a shard. Workers and sealing clients write parts with a conditional PUT. So a shard that was refused in
one copy of its message and done in another counts once. The metadata of a sealed part name SEALED as its writer. Workers note and
end; `Run` counts, ends and takes up. Errors are ServiceUnavailableError, and RunError for a part that cannot be written here.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from pipefleet._version import __version__
from pipefleet.connection.clock import ServerClock
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import reading
from pipefleet.connection.rights import may
from pipefleet.connection.scripts import run_script
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import MAX_RUN_ITEMS, MAX_SHARD_BYTES, MAX_SHARD_ITEMS, Shard, encode_json
from pipefleet.contract.parts import MAX_PART_BYTES, part_format
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import map_refs
from pipefleet.errors import ObjectMissingError, PipefleetError, RunError, ServiceUnavailableError
from pipefleet.foreign import read_object, readable, whole
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import base_queue, ledger_keys, run_key
from pipefleet.runs.files import MOST_BYTES
from pipefleet.runs.finishing import Resumed, finalise, read_resumed, read_totals, write_failed_rows
from pipefleet.runs.moving import read_moved
from pipefleet.runs.progress import RunProgress

if TYPE_CHECKING:
    from redis import Redis

    from pipefleet.settings import Settings
    from pipefleet.storage.store import ObjectStore

SEALED = "pipefleet-refused"
"""The writer of parts that stand for refused shards."""
_INDEX = re.compile(r"(\d{5,})\.json$")

NOTE = """
if ARGV[4] ~= '' and not redis.call('LPOS', KEYS[3], ARGV[4]) and not redis.call('LPOS', KEYS[4], ARGV[4]) then return 0 end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return 0 end
local shards = tonumber(redis.call('HGET', KEYS[5], 'shards') or nil)
if shards and tonumber(ARGV[1]) >= shards then return 0 end
local uri = redis.call('HGET', KEYS[5], 'uri')
if uri and uri ~= ARGV[5] then return 0 end
redis.call('HDEL', KEYS[1], '')
local new = redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1 + new
"""
"""KEYS: refused and parts of the run, dead letters of the queue, unreported ones, the run. ARGV: index, refusal, ttl, letter or '',
URI of the run. Returns a `Noted`. Nothing is noted for a letter that was queued again or removed meanwhile, for a shard that has a
part or that the run does not have, and for a run that lies elsewhere. The first write, here and in SEAL, takes no memory: see
`contract.records.NEEDS_NO_MEMORY`."""


SEAL = """
local resumed = redis.call('HGET', KEYS[1], 'resumed')
if resumed and resumed ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[5], ARGV[2])
for key = 2, 3 do
  for _, position in ipairs(cjson.decode(ARGV[4])) do redis.call('SETBIT', KEYS[key], position, 1) end
end
redis.call('SETBIT', KEYS[4], ARGV[2], 1)
for key = 2, 4 do redis.call('EXPIRE', KEYS[key], ARGV[3]) end
return 1
"""
"""KEYS: the run, its bitmaps items, failed and parts, and refused. ARGV: the word of `Resumed`, index, ttl, positions of the items
that failed with the shard. Returns 0, and sets nothing, when shards were taken up since that word was read."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A shard that no worker will run: its index, the positions of its items, and the reason."""

    index: int
    first: int
    count: int
    failure: JobFailure

    @classmethod
    def of(cls, shard: Shard, failure: JobFailure) -> Refusal:
        """The refusal of one shard."""
        return cls(shard.index, shard.first, shard.count, failure)

    def to_json(self) -> dict[str, Any]:
        """The failure with the positions of the items beside it."""
        return {**self.failure.to_json(), "first": self.first, "count": self.count}

    @classmethod
    def from_json(cls, index: int, text: bytes) -> Refusal | None:
        """The reverse of `to_json`; None for any other text."""
        try:
            whole(index, most=MAX_RUN_ITEMS)
            body = read_object(text)
            failure = JobFailure(*(str(body[name]) for name in ("code", "message", "stage")))
            # Messages may name any positions; those beyond the bounds of a shard and of a run hold no item.
            first, count = (whole(body[name], most=sys.maxsize) for name in ("first", "count"))
            return cls(index, min(first, MAX_RUN_ITEMS), min(count, MAX_SHARD_ITEMS), failure)
        except (ValueError, LookupError):
            return None


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a run in Redis. `shards` and `cancelled` are None if Redis has none. `done` and `failed` count items.

    `known` is False if Redis lacks the mark of the run: then it was emptied.
    """

    known: bool
    shards: int | None
    cancelled: bytes | None
    done: int
    failed: int
    parts: int
    refused: int
    reason: str | None
    """The reason of one of the refused shards."""

    @property
    def complete(self) -> bool:
        """Whether planning has ended and every shard has a part or was refused."""
        return self.shards is not None and self.parts + self.refused >= self.shards


class Noted(IntEnum):
    """The outcome of NOTE. NOT is false: a worker may run the shard after all."""

    NOT = 0
    AGAIN = 1
    NEW = 2


def note(redis: Redis, shard: Shard, failure: JobFailure, *, ttl: float, queue: str, letter: bytes = b"") -> Noted:
    """Note in Redis that no worker will run a shard. One round trip.

    With `letter`, the entry of its dead letter in `queue`, only while that letter is there.
    """
    run, ledger = shard.run_id, ledger_keys(queue)
    keys = [_key(run), run_key(run, "parts"), ledger["dead_key"], ledger["unreported_key"], run_key(run)]
    text = encode_json(Refusal.of(shard, failure).to_json())
    return Noted(int(run_script(redis, NOTE, keys, shard.index, text, int(ttl), letter, shard.run_uri)))


def _key(run_id: str) -> str:
    return run_key(run_id, "refused")


class Refusals:
    """The refused shards of one run. Thread-safe. Raises ServiceUnavailableError when Redis or S3 is away."""

    def __init__(self, redis: Redis, settings: Settings, store: ObjectStore, layout: RunLayout, run_id: str) -> None:
        self._redis = redis
        self._settings = settings
        self._store = store
        self._layout = layout
        self._id = run_id

    def counts(self) -> Counts:
        """The counts of the run in Redis, in one round trip."""
        pipe = reading(self._redis)
        pipe.hmget(run_key(self._id), ["since", "shards", "cancelled"])
        for bitmap in ("items", "failed", "parts"):
            pipe.bitcount(run_key(self._id, bitmap))
        pipe.hlen(_key(self._id))
        pipe.hrandfield(_key(self._id), 1, True)
        with self._errors():
            (mark, shards, cancelled), done, failed, parts, refused, one = pipe.execute()
        refusal = Refusal.from_json(0, one[1]) if one else None
        reason = None if refusal is None else refusal.failure.message
        with readable(f"the field shards of {run_key(self._id)} in Redis"):
            planned = None if shards is None else whole(shards)
        return Counts(mark is not None, planned, cancelled, done, failed, parts, refused, reason)

    def mark(self, index: int) -> None:
        """Copy the note of a shard from Redis into object storage, in case Redis loses it."""
        with self._errors():
            text: Any = self._redis.hget(_key(self._id), str(index))
        refusal = None if text is None else Refusal.from_json(index, text)
        if refusal is None:
            return
        self._put_mark(refusal)
        pipe = reading(self._redis)
        pipe.hexists(_key(self._id), str(index))
        pipe.getbit(run_key(self._id, "parts"), index)
        with self._errors():
            noted, done = pipe.execute()
        if not noted and not done:  # the shard was taken up meanwhile
            self._store.delete(self._layout.refused_shard(index))

    def all(self) -> dict[int, Refusal]:
        """Every refused shard by its index, sealed ones included."""
        with self._errors():
            raw: Any = self._redis.hgetall(_key(self._id))
        noted = (Refusal.from_json(int(field), text) for field, text in raw.items() if field.isdigit())
        return {one.index: one for one in (*self._marked(), *noted) if one is not None and one.index >= 0}

    def recall(self, is_accounted: Callable[[int], bool]) -> list[int]:
        """Note refused shards of object storage in Redis again, if `is_accounted` is False for them. Returns their indexes."""
        found = [one for index, one in self.all().items() if not is_accounted(index)]
        if found:
            pipe = self._redis.pipeline(transaction=True)
            for one in found:
                pipe.hsetnx(_key(self._id), str(one.index), encode_json(one.to_json()))
            pipe.expire(_key(self._id), int(self._settings.run_ttl))
            with self._errors():
                pipe.execute()
        return [one.index for one in found]

    def end(self, plan: RunPlan) -> RunProgress | None:
        """End a complete run: seal its refused shards, then write the totals. None for an incomplete or cancelled run.

        Several callers may do this at once, and again. Raises RunError if a part cannot be written here.
        """
        resumed = read_resumed(self._store, self._layout)  # first: a shard that is taken up from here on voids this end
        if self._store.head(self._layout.cancelled) is not None or (plan.shards and not self.counts().complete):
            return None
        try:
            return read_totals(self._store, self._layout) or self._end(plan, resumed)
        except ObjectMissingError:  # a part was taken up in the middle of this
            return None

    def _end(self, plan: RunPlan, resumed: Resumed) -> RunProgress | None:
        sealed = set()
        for one in (
            refused := {index: one for index, one in self.all().items() if index < (plan.shards or 0)}
        ).values():
            became = self._seal(plan, one, resumed)
            if became is None:
                return None
            sealed |= {one.index} if became else set()
        for index in set(resumed.shards) - sealed:
            self._list_failed(plan, index)
        reason = refused[min(sealed)].failure.message if sealed else None
        with self._errors():
            now = ServerClock(self._redis).now()
        return finalise(self._store, self._layout, plan, refused=len(sealed), reason=reason, resumed=resumed, now=now)

    def take_up(self, plan: RunPlan, only: Collection[int] | None = None) -> list[int]:
        """Make refused shards missing again, all or `only` some. Returns their indexes. An ended run counts as cancelled then.

        A shard whose list of items is gone stays refused. After an interruption this can be called again: the mark of a shard is
        removed last.
        """
        found = [one for index, one in sorted(self.all().items()) if only is None or index in only]
        there = {one.index for one in found if self._store.head(self._layout.shard(one.index)) is not None}
        if there:
            self._reopen(there)
        for one in found:
            if one.index not in there and one.index < (plan.shards or 0):
                self._seal(plan, one, read_resumed(self._store, self._layout))
        letters, word = self._letters(self._pools(plan), there), uuid.uuid4().hex
        taken = [one for one in found if one.index in there]
        indexes = [one.index for one in taken if self._forget(plan, one, letters.get(one.index, []), word)]
        if there:
            self._void_end(word, there)  # again, to void the end of a client that looked at the parts in between
        return indexes

    def _reopen(self, shards: Collection[int]) -> None:
        """Void the end of the run. A run that had ended counts as cancelled until it is resumed, so that nobody ends it anew."""
        if read_totals(self._store, self._layout) is not None:
            self._cancel()
        self._void_end(uuid.uuid4().hex, shards)
        self._store.delete(self._layout.success)
        self._store.delete(self._layout.failures)

    def _void_end(self, word: str, shards: Collection[int]) -> None:
        every = sorted({*shards, *read_resumed(self._store, self._layout).shards})
        self._store.put(self._layout.resumed, encode_json({"word": word, "shards": every}).encode())

    def _cancel(self) -> None:
        key = run_key(self._id)
        self._store.put(self._layout.cancelled, b"{}")
        with self._errors():
            self._redis.hset(key, "cancelled", "1")
            self._redis.expire(key, int(self._settings.run_ttl))

    def _forget(self, plan: RunPlan, refusal: Refusal, letters: Collection[tuple[str, bytes]], word: str) -> bool:
        """Remove note, sealed part and letters of one shard. False if a worker's part is there: it stays."""
        index, part = refusal.index, self._layout.part(refusal.index)
        undone = self._store.writer(part) == SEALED or self._store.head(part) is None
        pipe = self._redis.pipeline(transaction=True)
        if undone:
            for name in ("items", "failed"):
                for position in self._items(plan, refusal):
                    pipe.setbit(run_key(self._id, name), position, 0)
            pipe.setbit(run_key(self._id, "parts"), index, 0)
            pipe.hset(run_key(self._id), "resumed", word)  # a client that is sealing this shard no longer sets its bits
        pipe.hdel(_key(self._id), str(index))
        for queue, entry in letters:
            for name in ("dead_key", "unreported_key"):
                pipe.lrem(ledger_keys(queue)[name], 1, entry)  # type: ignore[arg-type]  # bytes are sent as they are
        with self._errors():
            pipe.execute()
        if undone:
            self._store.delete(self._layout.failed_shard(index))
            self._store.delete(part)
        self._store.delete(self._layout.refused_shard(index))
        return undone

    def _seal(self, plan: RunPlan, refusal: Refusal, resumed: Resumed) -> bool | None:
        """Give a refused shard a part. True if the part is one of failed rows, False if it is a worker's own.

        None if shards were taken up since `resumed` was read.
        """
        index = refusal.index
        if read_resumed(self._store, self._layout) != resumed:
            return None
        self._put_mark(refusal)  # first, so that every sealed part can be taken up
        items = self._items(plan, refusal)
        sealed = self._put_part(plan, refusal, items)
        self._list_failed(plan, index)
        keys = [run_key(self._id, name) for name in ("", "items", "failed", "parts", "refused")]
        positions = encode_json(list(items) if sealed else [])
        with self._errors():
            current = run_script(self._redis, SEAL, keys, resumed.word, index, int(self._settings.run_ttl), positions)
        if not sealed:
            self._store.delete(self._layout.refused_shard(index))
        elif not current:  # the client that took the shard up may have removed the mark before our part came
            self._put_mark(refusal)
        return sealed if current else None

    def _list_failed(self, plan: RunPlan, index: int) -> None:
        """List the failed items of a shard from its part, in the place of any earlier list."""
        part = self._store.get(self._layout.part(index), max_bytes=MAX_PART_BYTES)
        with readable(self._layout.part(index)):
            rows = part_format(plan.format).failed(part)
        write_failed_rows(self._store, self._layout, index, rows)
        if not rows:
            self._store.delete(self._layout.failed_shard(index))

    def _put_part(self, plan: RunPlan, refusal: Refusal, items: Mapping[int, dict[str, Any]]) -> bool:
        """Write the part of failed rows. False if a worker's part is there."""
        pinned = {"revision": plan.revision} if plan.revision else {}
        provenance = {"model": plan.model, **pinned, "pipefleet": __version__}
        error, written_as = {"error": refusal.failure.to_json()}, part_format(plan.format)
        rows = [{**error, **row, "provenance": provenance} for row in items.values()]
        try:
            body = written_as.encode([encode_json(row).encode() for row in rows])
        except RunError as error:
            text = f"{refusal.failure.message}; to end the run at {self._layout.uri} without this shard: {error}"
            raise RunError(text) from None
        uri = self._layout.part(refusal.index)
        return self._store.put_new(uri, body, content_type=written_as.media_type, writer=SEALED)

    def _items(self, plan: RunPlan, refusal: Refusal) -> dict[int, dict[str, Any]]:
        """The first fields of each item's row, by position. An item that the list does not tell has its position as its id."""
        listed: dict[int, dict[str, Any]] = {}
        try:
            lines = self._store.lines(self._layout.shard(refusal.index), max_bytes=MAX_SHARD_BYTES)
            for line in itertools.islice(lines, MAX_SHARD_ITEMS):
                position, row = _listed(line)
                listed[position] = row
        except ServiceUnavailableError:
            raise
        except (PipefleetError, ValueError, LookupError, TypeError):
            pass  # the list is gone or damaged
        if plan.items is None:
            return listed
        count = min(
            refusal.count, MAX_SHARD_ITEMS
        )  # a message may say more, and the shard itself tells which there are
        told = range(refusal.first, min(refusal.first + count, plan.items))
        places = sorted(place for place in {*told, *listed} if place < (plan.items or 0))
        return {place: listed.get(place, {"id": str(place), "input": None}) for place in places}

    def _pools(self, plan: RunPlan) -> list[str]:
        """The queue of every pool to which shards of the run were ever sent."""
        moved = read_moved(self._store, self._layout)
        return list(dict.fromkeys((base_queue(plan.queue), *(moved.pools if moved else ()))))

    def _letters(self, queues: Collection[str], indexes: Collection[int]) -> dict[int, list[tuple[str, bytes]]]:
        """The raw dead letters of shards, each with the queue of its pool; none without the right to see them.

        A letter that stays does no harm: a later requeue of it finds that its shard has ended, or waits.
        """
        ids = {f"{self._id}-{index:05d}": index for index in indexes}
        found: dict[int, list[tuple[str, bytes]]] = {}
        with self._errors():
            for queue in queues if ids else ():
                if not may(self._redis, *dead_letters.rights(queue, changes=True)):
                    continue
                for letter in dead_letters.every_dead_letter(self._redis, queue):
                    if (index := ids.get(letter.job_id or "")) is not None:
                        found.setdefault(index, []).append((queue, letter.entry))
        return found

    def _marked(self) -> Iterator[Refusal | None]:
        for entry in self._store.list(self._layout.refused):
            found = _INDEX.search(entry.key)
            if found:
                with suppress(ObjectMissingError):  # the shard was taken up since the listing
                    uri = self._layout.refused_shard(int(found[1]))
                    yield Refusal.from_json(int(found[1]), self._store.get(uri, max_bytes=MOST_BYTES))

    def _put_mark(self, refusal: Refusal) -> None:
        self._store.put(self._layout.refused_shard(refusal.index), encode_json(refusal.to_json()).encode())

    def _errors(self) -> Any:
        return redis_errors(self._settings.redis_url)


def _listed(line: bytes) -> tuple[int, dict[str, Any]]:
    """The position of an item, and the first fields of its row, from a line of a shard."""
    item = json.loads(line)
    more = {"parameters": item["parameters"]} if item.get("parameters") else {}
    more |= {"error": item["failure"]} if "failure" in item else {}  # it could not be prepared either way
    return whole(item["position"], most=MAX_RUN_ITEMS), {
        "id": item["id"],
        "input": map_refs(item["inputs"], lambda one: one.uri),
        **more,
    }
