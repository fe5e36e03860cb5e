"""Planning a bulk run: a source is cut into shards in object storage, and each is queued as soon as it is written.

    source items → shards (growing, bounded by count and bytes) → _run/shards/NNNNN.jsonl → one message each → run.json

`start` and `Run` make planners. Memory is one shard, for a source of any length. A planning that was interrupted goes on behind its
last shard. A planner also looks after the shards that it has queued (see `runs.backlog`): it waits for the fleet, and queues again
those that Redis lost. It raises errors of the source, RunError beside another planner, and ServiceUnavailableError.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import reading
from pipefleet.contract.layout import RunLayout, RunPlan, index_of
from pipefleet.contract.messages import MAX_RUN_ITEMS, JobItem, Priority, encode_json
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import split_uri
from pipefleet.contract.shards import ShardLimits, decode_shard_line, encode_shard_line, shard_limits, shard_message
from pipefleet.errors import InputError, PipefleetError, RunError, ServiceUnavailableError
from pipefleet.foreign import readable, whole
from pipefleet.inputs.rows import SourceItem
from pipefleet.inputs.sources import Source
from pipefleet.patience import PATIENCE_SECONDS, Patience
from pipefleet.queues.keys import run_key
from pipefleet.runs.backlog import Backlog
from pipefleet.runs.files import read_file
from pipefleet.runs.moving import moved_plan, read_moved
from pipefleet.runs.refusals import Refusals
from pipefleet.service import Service
from pipefleet.storage.store import ObjectStore

if TYPE_CHECKING:
    from pipefleet.session import Session

log = logging.getLogger(__name__)
ALIVE_SECONDS = 10.0
"""Seconds for which a planner counts as alive after a sign of life. It gives a sign every third of this, for any source."""
HELD_BACK_SECONDS = 0.5
"""Seconds between two looks of a planner that waits for the fleet."""
TEND_SECONDS = 5.0
"""Seconds between two looks at its shards while the source gives no item."""


class Planner:
    """Plans one run, shard by shard, and keeps its shards queued. For one thread at a time; any thread may call `stop`.

    A plan with totals needs no source (`source` is None): then missing shards are queued again, and the run is ended if all its
    parts are there.
    """

    def __init__(self, session: Session, layout: RunLayout, plan: RunPlan, source: Source | None) -> None:
        self._session = session
        self._layout = layout
        self._source = source
        self.plan = plan
        self.items = 0
        self.shards = 0
        self.continued = False
        """True if an earlier planner wrote shards. Then `run` first queues the missing ones."""
        self.usable = True
        """False after an error: items that were read and not written are lost, so another planner has to go on."""
        self._cut: Iterator[list[SourceItem]] | None = None
        self._writer = uuid.uuid4().hex
        self.alone = True
        """False once another client was seen to plan the same run."""
        self._wrote = False
        self._media = False
        self._stopped = threading.Event()
        self._patience = Patience(self._stopped)
        self.backlog = Backlog(session, layout, plan, self._patience)

    def prepare(self) -> None:
        """Find the place behind the shards of an earlier planner, or mark a new run. `step` and `run` call this themselves."""
        if self._cut is not None:
            return
        if self.plan.shards is not None:
            self.shards, self.items, self.continued = self.plan.shards, self.plan.items or 0, True
            self._cut = iter(())
            return
        last = self._resume_point()
        if not self.continued:
            self.backlog.begin()
        self._cut = self._shards(last)

    def step(self) -> bool:
        """Write and queue the next shard. False when the source is at its end and run.json is written."""
        try:
            self.prepare()
            assert self._cut is not None
            batch = next(self._cut, None)
            if batch is not None:
                self._write(batch)
            elif self.backlog.unrestored:  # the end of a run lists the failed items of all its parts
                self._patience.call(self.backlog.restore)
            else:
                self._patience.call(self._finish)
                return False
            return True
        except BaseException:
            self.usable = False
            raise

    def run(self) -> bool:
        """Plan to the end of the source, through outages of up to PATIENCE_SECONDS. False if it was stopped or cancelled before.

        `map` plans the first shard by `step`, which tries once, so that its caller sees an error at once. `run` waits while
        `Settings.outstanding_shards` of the run are outstanding, so that a fast source fills no Redis. Shards that Redis lost
        meanwhile are queued again.
        """
        self._patience.seconds = PATIENCE_SECONDS
        self._patience.call(self.prepare)
        while not self._stopped.is_set():
            room = self.backlog.room(self.shards)
            if self.backlog.cancelled:
                self.stop()
            elif room or (self.plan.shards is not None and not self.backlog.missing):
                if not self.step():
                    return True
            else:
                self._stopped.wait(HELD_BACK_SECONDS)
        return False

    def stop(self) -> None:
        """Let `run` return after the current shard."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """True after `stop`, until `go_on`."""
        return self._stopped.is_set()

    def go_on(self) -> None:
        """Undo `stop`: `run` may be called again, and queues shards that were dropped meanwhile."""
        self._stopped.clear()
        self.backlog.doubt()

    def undo(self) -> None:
        """Remove the objects and keys of a failed first step, so that the same call can be made again."""
        if self.alone and not self.items and not self.continued:
            # In this order: a plan without shards is harmless, a shard without a plan is not.
            with suppress(PipefleetError):
                self._session.store.delete(self._layout.shard(0))
                self._session.store.delete(self._layout.plan)
                self.backlog.forget()

    @contextmanager
    def alive(self, *, claimed: bool = True) -> Iterator[None]:
        """Give signs of life inside of the block, so that no other client takes the planning over.

        At the end the sign is removed, unless it may be another client's, which goes on: if another sign was there first (not
        `claimed`) and this planner wrote nothing, or if this planner saw that it is not alone.
        """
        signs = Service("pipefleet-alive", self._give_signs)
        tending = Service("pipefleet-tend", self._tend)
        self._give_sign()
        signs.start()
        tending.start()
        try:
            yield
        finally:
            tending.stop(0.0)
            signs.stop()
            tending.stop(ALIVE_SECONDS)  # bounded, because the thread may wait for a service that is away
            if self.alone and (claimed or self._wrote):
                release_planning(self._session, self.plan)

    def _give_signs(self, stopping: threading.Event) -> None:
        while not stopping.wait(ALIVE_SECONDS / 3):
            try:
                self._give_sign()
            except ServiceUnavailableError as error:  # the next sign is soon enough; planning meets the outage too
                log.debug("no sign of life: %s", error)
            except Exception:  # it must go on, or another client would take the planning over
                log.exception("no sign of life of the planning")

    def _tend(self, stopping: threading.Event) -> None:
        """Look after the outstanding shards while the source gives no item."""
        while not stopping.wait(TEND_SECONDS):
            if self._cut is not None and not self._stopped.is_set():
                try:
                    self.backlog.tend(self.shards)
                except PipefleetError as error:  # planning itself meets the error too
                    log.debug("shards are not looked after: %s", error)
                except Exception:
                    log.exception("looking after shards failed and goes on")
                if self.backlog.cancelled:
                    self.stop()

    def _give_sign(self) -> None:
        key = run_key(self.plan.id, "planner")
        with redis_errors(self._session.settings.redis_url):
            self._session.redis.set(key, f"{self.items} {self.shards}", ex=int(ALIVE_SECONDS))

    def _resume_point(self) -> SourceItem | None:
        """Count the shards of an earlier planner and find its last item, with one listing and one read of the last shard."""
        shards = 0
        for entry in self._session.store.list(self._layout.shards):
            if index_of(entry.key) != shards:
                raise RunError(f"shards are missing before {entry.key}; start the run anew under another output")
            shards += 1
        if not shards:
            return None
        where = self._layout.shard(shards - 1)
        with readable(where):
            *_, line = self._session.store.lines(where)
            position, item, _ = decode_shard_line(line)
        self.items, self.shards, self.continued = position + 1, shards, True
        return SourceItem(item.id, item.inputs, 0)

    def _shards(self, last: SourceItem | None) -> Iterator[list[SourceItem]]:
        batch: list[SourceItem] = []
        size = 0
        for item in self._read(last):
            if batch and size + item.size > self._limits(item).size:
                yield batch
                batch, size = [], 0
            batch.append(item)
            size += item.size
            limits = self._limits(item)
            if len(batch) >= limits.items or size >= limits.size:  # now: a slow source may give no next item for long
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _limits(self, item: SourceItem) -> ShardLimits:
        if item.failure is None:  # the input of a failed item may be anything, so it sets no bound
            self._media = not isinstance(item.inputs, str)
        return shard_limits(self.shards, self.plan.shard_size, media=self._media)

    def _read(self, last: SourceItem | None) -> Iterator[SourceItem]:
        """The items of the source after `last`. When a service was away, the source is opened again behind its last item."""
        read = self.items
        items: Iterator[SourceItem] | None = None

        def following() -> SourceItem | None:
            nonlocal items
            assert self._source is not None
            items = self._source.items(read, last) if items is None else items
            try:
                return next(items, None)
            except PipefleetError:
                items = None
                raise

        while (item := self._patience.call(following)) is not None:
            if item.failure is not None and self.plan.strict:
                raise InputError(_sentence(item, read))
            read, last = read + 1, item
            yield item

    def _write(self, batch: list[SourceItem]) -> None:
        if self.items + len(batch) > MAX_RUN_ITEMS:
            raise RunError(f"a run has at most {MAX_RUN_ITEMS} items; split the source")
        lines = []
        for offset, item in enumerate(batch):
            position = self.items + offset
            identity = str(position) if item.id is None else item.id
            failure = None if item.failure is None else JobFailure("bad_input", _sentence(item, position), "plan")
            plain = JobItem(identity, item.inputs, item.parameters)
            lines.append(encode_shard_line(position, plain, failure, written=item.written))
        body = ("\n".join(lines) + "\n").encode()
        if not self._patience.call(lambda: self._put(body)):
            self.alone = False
            raise RunError(f"another client plans the run at {self._layout.uri}; open it with `client.run(uri)`")
        self._wrote = True
        self.plan = self._patience.call(lambda: moved_plan(self._session, self.plan))
        message = shard_message(self.plan, self._layout, self.shards, self.items, len(batch))
        self._patience.call(lambda: self._session.publish([message], self.plan.queue, Priority.LOW))
        self.items += len(batch)
        self.shards += 1

    def _put(self, body: bytes) -> bool:
        """Write the next shard. True if the shard that is there is ours."""
        uri = self._layout.shard(self.shards)
        return self._session.store.put_new(uri, body, content_type="application/x-ndjson", writer=self._writer)

    def _finish(self) -> None:
        """Write the totals into the bucket and into Redis. If workers have written every part before, end the run here."""
        redis, store = self._session.redis, self._session.store
        total = replace(self.plan, shards=self.shards, items=self.items)
        store.put_new(self._layout.run, encode_json(total.to_json()).encode())
        with redis_errors(self._session.settings.redis_url):
            remember_totals(redis, total, ttl=self._session.settings.run_ttl)
            written = redis.bitcount(run_key(total.id, "parts"))
            written += redis.hlen(run_key(total.id, "refused"))
        if written >= self.shards:
            Refusals(redis, self._session.settings, store, self._layout, total.id).end(total)
        self.plan = total


def _sentence(item: SourceItem, position: int) -> str:
    """Why an item cannot be prepared, with its row (counted from 1) and its id."""
    identity = "" if item.id is None else f" (id {item.id[:80]!r})"
    return f"row {position + 1}{identity}: {item.failure}"


def remember_totals(redis: Any, plan: RunPlan, *, ttl: float) -> None:
    """Put a run's totals into Redis, where workers see that they wrote the last part."""
    key = run_key(plan.id)
    redis.hset(key, mapping={"shards": plan.shards or 0, "items": plan.items or 0})
    redis.expire(key, int(ttl))


def write_plan(session: Session, layout: RunLayout, plan: RunPlan) -> RunPlan:
    """Write plan.json, or take the plan of an interrupted client if it asks for the same.

    Raises RunError if there is another run, or files that are left of one.
    """
    session.store.require_bucket(layout.uri)
    if session.store.put_new(layout.plan, encode_json(plan.to_json()).encode(), writer=plan.id):
        leftover = _leftover(session.store, layout)
        if leftover is not None:
            session.store.delete(layout.plan)
            raise RunError(f"{leftover} is left of another run at {layout.uri}; choose another output, or remove it")
        return plan
    earlier = read_plan(session.store, layout)
    asked = replace(
        plan, id=earlier.id, created=earlier.created, queue=earlier.queue
    )  # the queue follows from the model
    same = replace(earlier, shards=None, items=None) == asked
    if earlier.shards is not None or not same:
        raise RunError(
            f"there is a run at {layout.uri} already; see `pipefleet status {layout.uri}`, go on with "
            f"`pipefleet resume {layout.uri}`, or choose another output"
        )
    return earlier


def _leftover(store: ObjectStore, layout: RunLayout) -> str | None:
    """The key of an object that workers or clients would take for a file of the new run; None if no such object is there."""
    _, own = split_uri(layout.plan)
    for entry in itertools.chain(store.list(layout.control), store.list(layout.parts), store.list(layout.success)):
        is_part_of_a_run = index_of(entry.key) is not None or not entry.key.startswith(split_uri(layout.parts)[1])
        if entry.key != own and is_part_of_a_run:
            return entry.key
    return None


def read_plan(store: ObjectStore, layout: RunLayout) -> RunPlan:
    """The plan in run.json, or in plan.json while the run is still being planned, after the moves of the run.

    Raises RunError if there is neither file.
    """
    for uri in (layout.run, layout.plan):
        if store.head(uri) is not None:
            plan, moved = RunPlan.from_json(read_file(store, uri), uri), read_moved(store, layout)
            return plan if moved is None else moved.applied(plan)
    raise RunError(f"there is no run at {layout.uri}; name the output that map was given")


def claim_planning(session: Session, plan: RunPlan) -> bool:
    """Give a planner's first sign of life, for ALIVE_SECONDS. False if there is a sign of another planner."""
    key = run_key(plan.id, "planner")
    with redis_errors(session.settings.redis_url):
        return bool(session.redis.set(key, "0 0", ex=int(ALIVE_SECONDS), nx=True))


def release_planning(session: Session, plan: RunPlan) -> None:
    """Remove the sign of life. Does nothing while Redis is away: the sign expires by itself."""
    with suppress(ServiceUnavailableError), redis_errors(session.settings.redis_url):
        session.redis.delete(run_key(plan.id, "planner"))


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """The items and shards that a live planner has queued so far."""

    items: int
    shards: int


def planner_alive(session: Session, plan: RunPlan) -> SignOfLife | None:
    """The sign of a live planner of this run; None without a live planner."""
    with redis_errors(session.settings.redis_url):
        found: Any = session.redis.get(run_key(plan.id, "planner"))
    if found is None:
        return None
    try:
        items, shards = map(whole, found.split())
    except ValueError:
        return SignOfLife(0, 0)  # a planner of another release: it lives, and nothing more is known
    return SignOfLife(items, shards)


def planner_gone(session: Session, plan: RunPlan) -> bool:
    """True if nobody plans this run.

    If Redis knows nothing of the run, it may have been emptied a moment ago, and a live planner will give its next sign soon.
    Then this waits for a sign, for half of ALIVE_SECONDS.
    """
    key = run_key(plan.id)
    return _comes_no_planner(session, plan, marked=lambda: bool(session.redis.exists(key)))


def is_forgotten(session: Session, plan: RunPlan) -> bool:
    """True if Redis has lost the mark of a run, and with it the waiting shards, and no planner is there to queue them again.

    Waits for a sign of life as `planner_gone` does.
    """
    key = run_key(plan.id)

    def is_marked() -> bool:
        with redis_errors(session.settings.redis_url):
            return bool(session.redis.hexists(key, "since"))

    return _comes_no_planner(session, plan, marked=is_marked) and not is_marked()


def _comes_no_planner(session: Session, plan: RunPlan, *, marked: Callable[[], bool]) -> bool:
    """True if no planner gives a sign of life for half of ALIVE_SECONDS. At once if Redis still has its data (`marked`)."""
    deadline = time.monotonic() + ALIVE_SECONDS / 2
    while planner_alive(session, plan) is None:
        with redis_errors(session.settings.redis_url):
            known = marked()
        if known or time.monotonic() >= deadline:
            return True
        time.sleep(ALIVE_SECONDS / 40)
    return False


def left_unqueued(session: Session, plan: RunPlan) -> int:
    """The number of missing shards that nobody queues any more, because the client that resumed the run has ended."""
    pipe = reading(session.redis)
    pipe.hget(run_key(plan.id), "unqueued")
    pipe.exists(run_key(plan.id, "planner"))
    with redis_errors(session.settings.redis_url):
        unqueued, alive = pipe.execute()
    try:
        return 0 if alive else whole(unqueued or 0)
    except ValueError:
        return 0
