"""One look at the fleet in Redis: waiting work, workers, speed, failures. `command` and the doctor call `read_fleet`.

    queues (as the scaler reads them) + announcements of workers + the scaler's memory ─▶ Snapshot

Raises ServiceUnavailableError while Redis is away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipefleet.client import Client
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import server_time
from pipefleet.connection.wrong_type import passed_over
from pipefleet.fleet.announcements import announced_workers, refused_places, workers_of
from pipefleet.fleet.pools import Fleet, model_label
from pipefleet.fleet.revisions import Held, Part, RevisionBacklog, every_part, parts_of
from pipefleet.foreign import read_object
from pipefleet.queues import dead_letters as deadletters
from pipefleet.queues.keys import scaler_key
from pipefleet_workers.fleet.local.parked import parked_pools
from pipefleet_workers.fleet.scaling.decide import State
from pipefleet_workers.fleet.scaling.signal import STATES, Memory, Reading, read_pool
from pipefleet_workers.observe.totals import Done, Items, read_items

SCALER_SECONDS = 90.0
"""An older number of the scaler is not shown: a scaler looks at least once a minute."""


@dataclass(frozen=True, slots=True)
class PoolRow:
    """One pool, or a revision that it is leaving.

    Seconds of backlog are device-seconds; None if nothing was measured, or no worker reports.
    """

    pool: str
    task: str
    model: str
    messages: Mapping[str, int]
    """The number of messages by state: `queued`, `leased` and `delayed`."""
    backlog_seconds: float | None
    oldest_age_seconds: float
    alive: int
    wanted: int | None
    """Workers that the scaler wants; None without a scaler."""
    items_per_second: float
    busy: float | None
    """Mean share of time in which a forward ran; None without a worker."""
    items: int
    """Items that ended since the pool began, and how many of them failed."""
    failed: int
    dead_letters: int
    note: str = ""
    """A fault in one sentence: workers that `pipefleet up` could not keep alive, or why messages wait. Empty if all is well."""
    cancelled: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker, as it announced itself `age` seconds ago."""

    worker: str
    pool: str
    """Its pool, or the revision that it serves, in the form of `PoolRow.pool`."""
    items_per_second: float
    busy: float
    items: int
    failed: int
    max_cost: int
    """Budget of a batch, padded."""
    pads: bool
    """Whether padding is exact; if not, only equal shapes share a batch."""
    base: float | None
    """Seconds of a batch without work, and of a unit of cost; None before the first batches."""
    per_cost: float | None
    age: float
    barred: str = ""
    """Why it takes no jobs: S3 refuses it. Empty if S3 does not."""
    refused: tuple[str, ...] = ()
    """Buckets that S3 refuses to this worker, and maybe not to others."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The fleet at `read_at` (seconds since 1970)."""

    read_at: float
    pools: tuple[PoolRow, ...]
    workers: tuple[WorkerRow, ...]
    troubles: Mapping[str, str] = field(default_factory=dict)
    """Why a pool has no row: one of its keys holds another type."""

    def to_json(self) -> dict[str, Any]:
        """The JSON form; `troubles` only where there are any."""
        return {name: one for name, one in asdict(self).items() if one or name != "troubles"}


def read_fleet(client: Client, fleet: Fleet | None = None, *, unnamed: bool = True) -> Snapshot:
    """Look once at the client's pools, or the pools of `fleet`; with `unnamed`, also at messages for revisions it does not name.

    Raises ServiceUnavailableError when Redis is away, UsageError for a wrong fleet file.
    """
    fleet = client.fleet if fleet is None else fleet
    with redis_errors(client.settings.redis_url):
        now = server_time(client.redis)
        announced = announced_workers(client.redis)
        workers = {one.worker: one for one in _workers(announced)}
        pools, troubles = [], dict[str, str]()
        parts = every_part if unnamed else parts_of
        for part in parts(client.redis, fleet, troubles=troubles):
            names = workers_of(announced, part.pool, part.queue)
            workers |= {name: replace(workers[name], pool=part.key) for name in names}
            serving = [workers[name] for name in names]
            row = None
            with passed_over(troubles, part.key):
                row = _pool(client.redis, part, serving, now)
            if row is None:
                continue
            if part.named or serving or any(row.messages.values()):
                pools.append(row if part.named else replace(row, note=_unserved(part, row, fleet)))
        parked = parked_pools(client.redis)
    pools = [replace(one, note=str(parked[one.pool])) if one.pool in parked else one for one in pools]
    rows = sorted(workers.values(), key=lambda one: (one.pool, one.worker))
    return Snapshot(now, tuple(pools), tuple(rows), troubles)


def _unserved(part: Part, row: PoolRow, fleet: Fleet) -> str:
    """Why messages for a revision that the fleet does not name go on waiting; empty if a worker serves it."""
    held = Held(row.messages["leased"], row.messages["delayed"])
    waits = RevisionBacklog(part, {"queued": row.messages["queued"]}, held, row.alive, fleet.pools.get(part.pool.name))
    return waits.note or ""


def _workers(announced: Mapping[str, Mapping[str, Any]]) -> list[WorkerRow]:
    return [
        WorkerRow(
            worker=name,
            pool=facts["pool"],
            items_per_second=facts.get("items_per_second", 0.0),
            busy=facts.get("busy", 0.0),
            items=int(facts.get("items", 0)),
            failed=int(facts.get("failed", 0)),
            max_cost=int(facts.get("max_cost", 0)),
            pads=bool(facts.get("pads")),
            base=facts.get("base"),
            per_cost=facts.get("per_cost"),
            age=facts["age"],
            barred=str(facts.get("barred") or ""),
            refused=tuple(refused_places(facts)),
        )
        for name, facts in announced.items()
    ]


def _pool(redis: Any, part: Part, workers: list[WorkerRow], now: float) -> PoolRow:
    pool = part.pool
    reading = read_pool(redis, part, workers=len(workers), now=now)
    memory, wanted = _scaler(redis, part.key, now)
    each = memory.seconds_per_cost or _seconds_per_cost(reading.done)
    ended = Items() if pool.generation else read_items(redis, pool.name)
    return PoolRow(
        pool=part.key,
        task=pool.task,
        model=model_label(pool.model, pool.revision),
        messages={state: reading.count(state) for state in STATES},
        backlog_seconds=_backlog(reading, each),
        oldest_age_seconds=reading.oldest_age,
        alive=len(workers),
        wanted=wanted,
        items_per_second=sum(one.items_per_second for one in workers),
        busy=sum(one.busy for one in workers) / len(workers) if workers else None,
        items=ended.items,
        failed=ended.failed,
        cancelled=ended.cancelled,
        expired=ended.expired,
        dead_letters=0 if pool.generation else deadletters.count_dead_letters(redis, part.queue),
    )


def _scaler(redis: Any, pool: str, now: float) -> tuple[Memory, int | None]:
    """The scaler's measurements of a pool, and the workers that it wants; None for these if its last look is too old."""
    try:
        content = read_object(redis.get(scaler_key(pool)))
        memory, state = Memory.from_json(content["memory"]), State.from_json(content["state"])
    except (ValueError, LookupError, TypeError):
        return Memory(), None
    fresh = state.at is not None and abs(now - state.at) < SCALER_SECONDS
    return memory, state.workers if fresh else None


def _seconds_per_cost(done: Done) -> float | None:
    """The value without a scaler: seconds of all forwards so far, over the cost done."""
    return done.seconds / done.cost if done.cost > 0 and done.seconds > 0 else None


def _backlog(reading: Reading, each: float | None) -> float | None:
    cost = sum(one.count * one.mean for state in STATES for one in reading.contents.get(state, {}).values())
    return 0.0 if not cost else None if each is None else cost * each
