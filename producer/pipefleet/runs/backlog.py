"""The backlog of a run: missing shards, which nothing accounts for, and parts whose progress Redis does not know.

    ids in the queue and with workers ─┐
    parts, refused shards ─────────────┼─▶ missing shards ──▶ queued again, within the bound of outstanding ones
                                       └─▶ parts that Redis does not know ──▶ progress bits, lists of failed items

Object storage is the truth. Redis may be emptied at any time, by a restart or by hand. Redis carries a mark of the run: when the
mark is gone, or when the fleet stands still although shards are outstanding, everything is compared again. A shard that is queued
once too often changes nothing, because its part is written once. Planners and `Run` use a backlog. RunError says that the run is a
copy of one elsewhere; ServiceUnavailableError that Redis or S3 is away.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.rights import may
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import MAX_RUN_ITEMS, MAX_SHARD_ITEMS, JobMessage, Priority, encode_json
from pipefleet.contract.parts import MAX_PART_BYTES, part_format
from pipefleet.contract.shards import decode_shard_line, shard_index, shard_message
from pipefleet.contract.uris import shown, uri_fault
from pipefleet.errors import RunError
from pipefleet.foreign import readable, whole
from pipefleet.patience import Patience
from pipefleet.queues.keys import ledger_keys, run_key
from pipefleet.queues.looking import queue_depth, queued_ids
from pipefleet.runs.finishing import write_failed_rows
from pipefleet.runs.moving import MOVED, moved_by, read_moved
from pipefleet.runs.refusals import Refusals

if TYPE_CHECKING:
    from pipefleet.session import Session

LOOK_SECONDS = 1.0
"""Seconds between two looks at the run in Redis, while there is room."""
STALLED_SECONDS = 60.0
"""Seconds in which no shard ends, at the bound of outstanding shards, before the shards are looked for in the queue."""
MESSAGES = 100
"""Messages that are queued in one round trip."""
PARTS = 64
"""Parts whose progress is restored in one step of the planner."""
READERS = 8
_FIRST = re.compile(rb'\{"position":(\d+),')


class Backlog:
    """The shards of one run that are not done. Thread-safe.

    `planned` is everywhere the number of shards in object storage. Memory is a byte or two for each of them.
    """

    def __init__(
        self,
        session: Session,
        layout: RunLayout,
        plan: RunPlan,
        patience: Patience,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._layout = layout
        self._plan = plan
        self._patience = patience
        self._clock = clock
        self._refusals = Refusals(session.redis, session.settings, session.store, layout, plan.id)
        self._lock = threading.RLock()
        self._sure = False
        """Whether object storage and Redis were compared since this object was made or Redis was emptied."""
        self._missing = array("Q")
        self._unrestored = array("Q")
        self._word: bytes | bool | None = False
        """The word of `Resumed` at the last look; False before the first look."""
        self._ended = 0
        self._next_look = 0.0
        self._still_since = clock()
        self.cancelled = False
        """Whether the run was cancelled, at the last look."""

    @property
    def missing(self) -> int:
        """The number of shards that are still to be queued again."""
        return len(self._missing)

    @property
    def unrestored(self) -> int:
        """The number of parts that Redis does not know yet."""
        return len(self._unrestored)

    def begin(self) -> None:
        """Mark a run without shards in Redis. There is nothing to compare yet."""
        with self._lock:
            self._mark()
            self._sure = True

    def forget(self) -> None:
        """Remove the mark of `begin`."""
        with redis_errors(self._session.settings.redis_url):
            self._session.redis.delete(run_key(self._plan.id))

    def doubt(self) -> None:
        """Compare object storage and Redis again before the next shard is queued."""
        with self._lock:
            self._sure = False

    def room(self, planned: int) -> int:
        """The number of new shards that may be queued now; 0 while shards are missing, which are queued first.

        Asks Redis when its last answer is old or leaves no room, through outages. Afterwards `cancelled` is up to date.
        """
        return self._patience.call(lambda: self.tend(planned))

    def tend(self, planned: int) -> int:
        """As `room`, but with one try. Raises ServiceUnavailableError."""
        with self._lock:
            old = self._clock() >= self._next_look or not self._sure
            if old or self.cancelled or self._missing or self._unrestored or self._free(planned) <= 0:
                self._catch_up(planned)
            return 0 if self._missing else max(0, self._free(planned))

    def find(self, planned: int) -> int:
        """Compare object storage and Redis now. Returns the number of missing shards; `room` queues them."""
        with self._lock:
            moved = read_moved(
                self._session.store, self._layout
            )  # Redis may have forgotten the move, and the cancellation
            self._plan = self._plan if moved is None else moved.applied(self._plan)
            self._mark({} if moved is None else {MOVED: encode_json(moved.to_json())})
            if self._session.store.head(self._layout.cancelled) is not None:
                self._cancel()
            # The queue first: a shard that ends meanwhile has a part, which is looked at next.
            accounted = self._queued(planned)
            for index in self._compare_parts(planned):
                accounted[index] = 1
            for index in self._refusals.recall(lambda index: index >= planned or bool(accounted[index])):
                accounted[index] = 1
            self._missing = array("Q", (index for index, one in enumerate(accounted) if not one))
            self._note_missing()
            self._sure = True
            return self.missing

    def recall(self, planned: int) -> None:
        """Restore the progress of every part that Redis does not know."""
        self.find(planned)
        while self.unrestored:
            self.restore()

    def restore_unknown(self, planned: int) -> int:
        """Restore the progress of every part that Redis does not know, and queue nothing. Returns the number of parts.

        A failover loses the last writes of Redis: it may forget a part whose message the new primary then acknowledged.
        """
        with self._lock:
            if not may(self._session.redis, ("SETBIT", run_key(self._plan.id, "parts"), "0", "1")):
                return 0
            self._compare_parts(planned)
            found = self.unrestored
            while self.unrestored:
                self.restore()
            return found

    def publish(self, indexes: Collection[int]) -> None:
        """Queue these shards now, beyond the bound of outstanding shards if need be."""
        with self._lock:
            for index in indexes:
                message = next(self._messages(array("Q", (index,)), index + 1))
                self._session.publish([message], self._plan.queue, Priority.LOW)
            self._missing = array("Q", (index for index in self._missing if index not in indexes))
            self._note_missing()

    def restore(self) -> None:
        """Restore the progress of up to PARTS parts that Redis does not know, and their lists of failed items."""
        with self._lock:
            some = self._unrestored[:PARTS]
            if not some:
                return
            with ThreadPoolExecutor(READERS, thread_name_prefix="pipefleet-restore") as pool:
                list(pool.map(self._restore_part, some))
            ttl = int(self._session.settings.run_ttl)
            with redis_errors(self._session.settings.redis_url):
                for bitmap in ("items", "failed", "parts"):
                    self._session.redis.expire(run_key(self._plan.id, bitmap), ttl)
            del self._unrestored[: len(some)]

    def _catch_up(self, planned: int) -> None:
        known = self._look()
        if self.cancelled:
            return
        if not (known and self._sure) or (self._stands_still(planned) and self._is_short(planned)):
            self.find(planned)
        if not self.cancelled:
            self._queue(planned)
            self.restore()

    def _look(self) -> bool:
        """Read how many shards have ended and whether the run was cancelled. False if the mark of the run is gone.

        A client that moved the run took its messages out of their queue, and a client that took up refused shards left them
        missing. So after either, everything is compared again.
        """
        pipe = self._session.redis.pipeline(transaction=False)
        pipe.hmget(run_key(self._plan.id), ["since", "cancelled", MOVED, "resumed"])
        pipe.bitcount(run_key(self._plan.id, "parts"))
        pipe.hlen(run_key(self._plan.id, "refused"))
        with redis_errors(self._session.settings.redis_url):
            (mark, cancelled, moved, word), written, refused = pipe.execute()
        before, self._plan = self._plan, moved_by(moved, self._plan)
        if before != self._plan or word != (word if self._word is False else self._word):
            self._sure = False
        self._word = word
        if written + refused != self._ended:
            self._still_since = self._clock()
        self._ended = written + refused
        self.cancelled = bool(cancelled)
        self._next_look = self._clock() + LOOK_SECONDS
        return mark is not None

    def _free(self, planned: int) -> int:
        outstanding = planned - len(self._missing) - len(self._unrestored) - self._ended
        return self._session.settings.outstanding_shards - outstanding

    def _stands_still(self, planned: int) -> bool:
        if self._missing or self._free(planned) > 0 or self._clock() < self._still_since + STALLED_SECONDS:
            return False
        self._still_since = self._clock()
        return True

    def _is_short(self, planned: int) -> bool:
        """Whether fewer shards are with the fleet than are outstanding: a queue was purged, or Redis lost its last writes."""
        with redis_errors(self._session.settings.redis_url):
            if not self._reads_queue():
                there = sum(queue_depth(self._session.redis, self._plan.queue).values())
                return there < planned - len(self._unrestored) - self._ended
        return sum(self._queued(planned)) < planned - len(self._unrestored) - self._ended

    def _reads_queue(self) -> bool:
        """Whether this client may read messages. A producer may not, see `pipefleet.connection.rights`."""
        queue = self._plan.queue
        ledger = ledger_keys(queue)["unacked_key"]
        return may(self._session.redis, ("LRANGE", queue, "0", "-1"), ("HSCAN", ledger, "0"))

    def _require_place(self) -> None:
        """Raise RunError for a copy of a run whose original is where Redis knows it: the notes in Redis are the original's."""
        with redis_errors(self._session.settings.redis_url):
            found: Any = self._session.redis.hget(run_key(self._plan.id), "uri")
        known = (found or b"").decode(errors="replace")
        if known in ("", self._layout.uri) or uri_fault(known) is not None:
            return
        if self._session.store.head(RunLayout(known).plan) is not None:
            raise RunError(f"{shown(self._layout.uri)} is a copy of the run at {shown(known)}; go on with that one")

    def _mark(self, more: Mapping[Any, Any] | None = None) -> None:
        self._require_place()
        key = run_key(self._plan.id)
        with redis_errors(self._session.settings.redis_url):
            known: dict[Any, Any] = {"uri": self._layout.uri, "since": self._session.now()}
            self._session.redis.hset(key, mapping={**(more or {}), **known})
            self._session.redis.expire(key, int(self._session.settings.run_ttl))

    def _cancel(self) -> None:
        with redis_errors(self._session.settings.redis_url):
            self._session.redis.hset(run_key(self._plan.id), "cancelled", 1)
        self.cancelled = True

    def _queued(self, planned: int) -> bytearray:
        """A byte for each shard: 1 if it waits in the queue or is with a worker; all 0 if this client may not read messages.

        Without that right, waiting shards are queued once more. A worker that gets the second message finds the part and does
        nothing.
        """
        found = bytearray(planned)
        with redis_errors(self._session.settings.redis_url):
            if not self._reads_queue():
                return found
            for job_id in queued_ids(self._session.redis, self._plan.queue):
                index = shard_index(self._plan.id, job_id)
                if index is not None and index < planned:
                    found[index] = 1
        return found

    def _compare_parts(self, planned: int) -> array[int]:
        """The shards that have parts. The parts that Redis does not know are noted for `restore`."""
        known = self._known_parts()
        there = array(
            "Q", (index for index in self._parts() if index < planned)
        )  # higher numbers are no parts of this run
        self._unrestored = array(
            "Q", (one for one in there if not (one >> 3 < len(known) and known[one >> 3] & 0x80 >> (one & 7)))
        )
        return there

    def _known_parts(self) -> bytes:
        """The bitmap of parts, the first one in the highest bit."""
        with redis_errors(self._session.settings.redis_url):
            found: Any = self._session.redis.get(run_key(self._plan.id, "parts"))
        return found or b""

    def _parts(self) -> Iterator[int]:
        indexes = (self._layout.part_of(entry.key) for entry in self._session.store.list(self._layout.parts))
        return (index for index in indexes if index is not None)

    def _queue(self, planned: int) -> None:
        """Queue missing shards, within the bound of outstanding shards."""
        while self._missing and (room := self._free(planned)) > 0:
            some = self._missing[: min(room, MESSAGES)]
            self._session.publish(list(self._messages(some, planned)), self._plan.queue, Priority.LOW)
            del self._missing[: len(some)]
            self._note_missing()

    def _note_missing(self) -> None:
        """Note in Redis how many shards this client still has to queue, so that other clients see if it ends before."""
        key = run_key(self._plan.id)
        with redis_errors(self._session.settings.redis_url):
            if self._missing:
                self._session.redis.hset(key, "unqueued", self.missing)
            else:
                self._session.redis.hdel(key, "unqueued")

    def _messages(self, indexes: array[int], planned: int) -> Iterator[JobMessage]:
        """The messages of shards. A shard ends where the next begins, so the first bytes of objects tell all sizes but the last."""
        known: dict[int, int] = {}
        for index in indexes:
            first = known.get(index)
            first = self._first(index) if first is None else first
            end = self._end(index) if index + 1 == planned else self._first(index + 1)
            known = {index + 1: end}
            yield shard_message(self._plan, self._layout, index, first, end - first)

    def _first(self, index: int) -> int:
        """The position of the first item of a shard."""
        uri = self._layout.shard(index)
        found = _FIRST.match(self._session.store.start(uri, 64))
        with readable(uri):
            first = int(found[1]) if found else decode_shard_line(next(self._session.store.lines(uri)))[0]
            return whole(first, most=MAX_RUN_ITEMS)

    def _end(self, index: int) -> int:
        """The position behind the last item of a shard."""
        uri = self._layout.shard(index)
        with readable(uri):
            *_, last = self._session.store.lines(uri)
            return whole(decode_shard_line(last)[0], most=MAX_RUN_ITEMS) + 1

    def _restore_part(self, index: int) -> None:
        layout, store = self._layout, self._session.store
        part = store.get(layout.part(index), max_bytes=MAX_PART_BYTES)
        with readable(layout.part(index)):
            rows = list(itertools.islice(part_format(layout.format).rows(part), MAX_SHARD_ITEMS))
            write_failed_rows(store, layout, index, rows)
        pipe = self._session.redis.pipeline(transaction=False)
        for position, row in enumerate(rows, start=self._first(index)):
            pipe.setbit(run_key(self._plan.id, "items"), position, 1)
            pipe.setbit(run_key(self._plan.id, "failed"), position, int("error" in row))
        pipe.setbit(run_key(self._plan.id, "parts"), index, 1)
        with redis_errors(self._session.settings.redis_url):
            pipe.execute()
