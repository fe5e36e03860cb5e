"""Planning a bulk run: the source, cut into shards that lie in object storage, each queued as soon as it is written.

    source items → shards (growing, bounded by count and bytes) → _run/shards/NNNNN.jsonl → one message each → run.json

Memory is one shard, however long the source. A plan that was interrupted goes on behind its last shard.
"""

from __future__ import annotations

import itertools
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipefleet import broker
from pipefleet.contract import JobItem, JobMessage, Priority, Shard, encode_json
from pipefleet.errors import PipefleetError, RunError, ServiceUnavailableError
from pipefleet.finishing import finalise
from pipefleet.layout import RunLayout, RunPlan, index_of
from pipefleet.moving import moved_plan, read_moved
from pipefleet.objects import ObjectStore
from pipefleet.patience import Patience
from pipefleet.sources import Source, SourceItem
from pipefleet.storage import split_uri

if TYPE_CHECKING:
    from pipefleet.client import Client

SMALLEST_SHARD = 16
LARGEST_SHARD = 512
SHARDS_OF_A_SIZE = 8
MEDIA_BYTES = 64 << 20
TEXT_BYTES = 1 << 20
ALIVE_SECONDS = 10.0
"""How long a planner counts as alive after its last sign; it gives one every third of this, however slow its source."""
HELD_BACK_SECONDS = 0.5
"""How long a planner waits before it looks again whether the fleet has caught up."""
PATIENCE_SECONDS = 300.0
"""How long a planner goes on trying while Redis or S3 is away. The first shard is tried once: `map` tells its caller."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one shard: number of items, bytes of their inputs."""

    items: int
    size: int


def shard_limits(index: int, shard_size: int | None, *, media: bool) -> Limits:
    """The bounds of shard `index`.

    Sizes double every 8 shards from 16 to 512: a small run spreads over many workers and shows results at once, a
    large one has few messages and parts. `shard_size` fixes the count instead.
    """
    grown = min(LARGEST_SHARD, SMALLEST_SHARD << min(index // SHARDS_OF_A_SIZE, 10))
    return Limits(shard_size or grown, MEDIA_BYTES if media else TEXT_BYTES)


def shard_id(run_id: str, index: int) -> str:
    """The job id of a shard: the same whoever queues it, so that a duplicate can be told."""
    return f"{run_id}-{index:05d}"


def shard_message(plan: RunPlan, layout: RunLayout, index: int, first: int, count: int) -> JobMessage:
    """The message for one shard of a run."""
    shard = Shard(plan.id, layout.uri, layout.shard(index), index, first, count, plan.format)
    return JobMessage(
        id=shard_id(plan.id, index),
        task=plan.task,
        model=plan.model,
        revision=plan.revision,
        parameters=plan.parameters,
        shard=shard,
        cost=float(count),
    )


def encode_shard_line(position: int, item: JobItem) -> str:
    """One line of a shard."""
    return encode_json({"position": position, **item.to_json()})


def decode_shard_line(line: bytes, loads: Callable[[bytes], Any] = json.loads) -> tuple[int, JobItem]:
    """Position in the run, and item, of one line of a shard. Raises ContractError or ValueError for anything else."""
    fields = loads(line)
    return int(fields.pop("position")), JobItem.from_json(fields)


class Planner:
    """Plans one run, a shard at a time. Used by one thread at a time; any thread may call `stop`."""

    def __init__(self, client: Client, layout: RunLayout, plan: RunPlan, source: Source) -> None:
        self._client = client
        self._layout = layout
        self._source = source
        self.plan = plan
        self.items = 0
        self.shards = 0
        self.continued = False
        """True when shards of an earlier planner were found; those are not queued here but by `Run.resume`."""
        self.usable = True
        """False after an error: what was read and not yet written is lost, so another planner has to go on."""
        self._cut: Iterator[list[SourceItem]] | None = None
        self._writer = uuid.uuid4().hex
        self._alone = True
        self._stopped = threading.Event()
        self._patience = Patience(self._stopped)

    def step(self) -> bool:
        """Write and queue the next shard. False when the source is at its end and run.json is written."""
        try:
            if self._cut is None:
                self._cut = self._shards(self._resume_point())
            batch = next(self._cut, None)
            if batch is None:
                self._patience.call(self._finish)
                return False
            self._write(batch)
            return True
        except BaseException:
            self.usable = False
            raise

    def run(self) -> bool:
        """Plan to the end of the source, through outages of up to PATIENCE_SECONDS. False when it was stopped before.

        Waits while the fleet has `Settings.outstanding_shards` of the run before it, so that a fast source fills no Redis.
        """
        self._patience.seconds = PATIENCE_SECONDS
        while not self._stopped.is_set():
            if self._held_back():
                self._stopped.wait(HELD_BACK_SECONDS)
            elif not self.step():
                return True
        return False

    def _held_back(self) -> bool:
        most, redis = self._client.settings.outstanding_shards, self._client.redis

        def written() -> int:
            with broker.redis_errors(self._client.settings.redis_url):
                return int(redis.bitcount(broker.run_key(self.plan.id, "parts")))

        return self.shards >= most and self.shards - self._patience.call(written) >= most

    def stop(self) -> None:
        """Let `run` return after the shard it is at."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """True after `stop`, until `go_on`."""
        return self._stopped.is_set()

    def go_on(self) -> None:
        """Undo `stop`: `run` may be called again, and whoever does queues what was dropped meanwhile."""
        self._stopped.clear()
        self.continued = True

    def undo(self) -> None:
        """Remove what a first step that failed may have written, so that the same call can be made again."""
        if self._alone and not self.items and not self.continued:
            # In this order: a plan without shards is harmless, a shard without a plan is not.
            with suppress(PipefleetError):
                self._client.store.delete(self._layout.shard(0))
                self._client.store.delete(self._layout.plan)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life inside the block, so that nobody else takes the planning over."""
        ended = threading.Event()
        thread = threading.Thread(target=self._give_signs, args=(ended,), name="pipefleet-alive", daemon=True)
        self._give_sign()
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            # The sign expires by itself; an error here would only hide the one that ended the block.
            with suppress(ServiceUnavailableError), broker.redis_errors(self._client.settings.redis_url):
                self._client.redis.delete(broker.run_key(self.plan.id, "planner"))

    def _give_signs(self, ended: threading.Event) -> None:
        while not ended.wait(ALIVE_SECONDS / 3):
            with suppress(ServiceUnavailableError):  # the next sign is soon enough; planning itself will say so too
                self._give_sign()

    def _give_sign(self) -> None:
        key = broker.run_key(self.plan.id, "planner")
        with broker.redis_errors(self._client.settings.redis_url):
            self._client.redis.set(key, f"{self.items} {self.shards}", ex=int(ALIVE_SECONDS))

    def _resume_point(self) -> SourceItem | None:
        """Count what an earlier, interrupted planner wrote, and find its last item."""
        last: SourceItem | None = None
        for entry in self._client.store.list(self._layout.shards):
            index = index_of(entry.key)
            if index != self.shards:
                raise RunError(f"shards are missing before {entry.key}; start the run anew under another output")
            lines = list(self._client.store.lines(self._layout.shard(index)))
            position, item = decode_shard_line(lines[-1])
            last = SourceItem(item.id, item.inputs, 0)
            self.items, self.shards, self.continued = position + 1, index + 1, True
        return last

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
            if len(batch) >= limits.items or size >= limits.size:  # at once: a slow source may keep the next item back
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _limits(self, item: SourceItem) -> Limits:
        return shard_limits(self.shards, self.plan.shard_size, media=not isinstance(item.inputs, str))

    def _read(self, last: SourceItem | None) -> Iterator[SourceItem]:
        """The source after `last`; opened again behind the last item when a service it reads from was away."""
        read = self.items
        items: Iterator[SourceItem] | None = None

        def following() -> SourceItem | None:
            nonlocal items
            items = self._source.items(read, last) if items is None else items
            try:
                return next(items, None)
            except PipefleetError:
                items = None
                raise

        while (item := self._patience.call(following)) is not None:
            read, last = read + 1, item
            yield item

    def _write(self, batch: list[SourceItem]) -> None:
        lines = []
        for offset, item in enumerate(batch):
            position = self.items + offset
            identity = str(position) if item.id is None else item.id
            lines.append(encode_shard_line(position, JobItem(identity, item.inputs, item.parameters)))
        body = ("\n".join(lines) + "\n").encode()
        if not self._patience.call(lambda: self._put(body)):
            self._alone = False
            raise RunError(f"another client plans the run at {self._layout.uri}; open it with `client.run(uri)`")
        self.plan = self._patience.call(lambda: moved_plan(self._client, self.plan))
        message = shard_message(self.plan, self._layout, self.shards, self.items, len(batch))
        self._patience.call(lambda: self._client.publish([message], self.plan.queue, Priority.LOW))
        self.items += len(batch)
        self.shards += 1

    def _put(self, body: bytes) -> bool:
        """Write the next shard; True when it is there and ours."""
        uri = self._layout.shard(self.shards)
        return self._client.store.put_new(uri, body, content_type="application/x-ndjson", writer=self._writer)

    def _finish(self) -> None:
        """Write the totals where both sides look for them. Workers may have written every part before this."""
        redis, store = self._client.redis, self._client.store
        total = replace(self.plan, shards=self.shards, items=self.items)
        store.put_new(self._layout.run, encode_json(total.to_json()).encode())
        with broker.redis_errors(self._client.settings.redis_url):
            remember_totals(redis, total, ttl=self._client.settings.run_ttl)
            written = redis.bitcount(broker.run_key(total.id, "parts"))
        if written >= self.shards:
            finalise(store, self._layout, total)
        self.plan = total


def remember_totals(redis: Any, plan: RunPlan, *, ttl: float) -> None:
    """Put a run's totals where workers look for them to see that they wrote the last part."""
    key = broker.run_key(plan.id)
    redis.hset(key, mapping={"shards": plan.shards or 0, "items": plan.items or 0})
    redis.expire(key, int(ttl))


def write_plan(client: Client, layout: RunLayout, plan: RunPlan) -> RunPlan:
    """Write plan.json, or take the one of an interrupted client if it asks for the same.

    Raises RunError where there is another run, or something that is left of one.
    """
    client.store.require_bucket(layout.uri)
    if client.store.put_new(layout.plan, encode_json(plan.to_json()).encode(), writer=plan.id):
        leftover = _leftover(client.store, layout)
        if leftover is not None:
            client.store.delete(layout.plan)
            raise RunError(f"{leftover} is left of another run at {layout.uri}; choose another output, or remove it")
        return plan
    earlier = read_plan(client.store, layout)
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
    """The key of something that workers or clients would take for a part of the new run."""
    _, own = split_uri(layout.plan)
    for entry in itertools.chain(store.list(layout.control), store.list(layout.parts), store.list(layout.success)):
        is_part_of_a_run = index_of(entry.key) is not None or not entry.key.startswith(split_uri(layout.parts)[1])
        if entry.key != own and is_part_of_a_run:
            return entry.key
    return None


def read_plan(store: ObjectStore, layout: RunLayout) -> RunPlan:
    """run.json, or plan.json while the run is still being planned, with what the run was moved to since.

    Raises RunError where there is neither.
    """
    for uri in (layout.run, layout.plan):
        if store.head(uri) is not None:
            plan, moved = RunPlan.from_json(json.loads(store.get(uri)), uri), read_moved(store, layout)
            return plan if moved is None else moved.applied(plan)
    raise RunError(f"there is no run at {layout.uri}; name the output that map was given")


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """What a live planner has queued so far."""

    items: int
    shards: int


def planner_alive(client: Client, plan: RunPlan) -> SignOfLife | None:
    """What a live planner of this run has queued; None when there is no live planner."""
    with broker.redis_errors(client.settings.redis_url):
        found: Any = client.redis.get(broker.run_key(plan.id, "planner"))
    return None if found is None else SignOfLife(*map(int, found.split()))
