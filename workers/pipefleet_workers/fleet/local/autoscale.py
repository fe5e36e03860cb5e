"""Scales the workers of one machine by the scaler's numbers: `pipefleet up --autoscale`.

    Scaler (a thread of ScalerService) ─▶ workers wanted ─▶ share of the cores ─▶ Crew: start, or drain the least useful

`Stack.step` calls `Autoscaler.step`. The rule and the HTTP answers are the same as for KEDA on a cluster, so a trial here holds
there. While Redis is away, nothing changes.
"""

from __future__ import annotations

import os
import socket
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.errors import ServiceUnavailableError, UsageError
from pipefleet.fleet.announcements import announce_pool
from pipefleet.fleet.pools import Fleet, Pool, WorkerRange
from pipefleet.fleet.routing import announcement, queue_name
from pipefleet.queues.keys import ledger_keys
from pipefleet.settings import Settings
from pipefleet_workers.fleet.local.ports import LOOPBACK
from pipefleet_workers.fleet.local.spread import room_of
from pipefleet_workers.fleet.local.workers import Crew, WorkerProcess
from pipefleet_workers.fleet.scaling.service import PoolStatus, Scaler, ScalerService
from pipefleet_workers.observe.logs import say
from pipefleet_workers.process.host import Count, visible_gpus


@dataclass(frozen=True, slots=True)
class Pace:
    """How an autoscaled stack follows the work, in seconds. The defaults suit a machine that has its models already."""

    interval: float = 5.0
    """Seconds between two looks at the queues."""
    cold_start: float = 10.0
    """From the start of a worker to its first job."""
    hold: float = 60.0
    """Fewer workers must be wanted for this long before some are drained."""
    port: int | None = None
    """The scaler's port; None for a free one."""


class Autoscaler:
    """The scaler of a stack, with the code that follows its numbers. One thread calls `step`, again and again."""

    def __init__(self, path: Path, fleet: Fleet, settings: Settings, pace: Pace, *, crew: Crew, port: int) -> None:
        """Raises UsageError when `port` is in use."""
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._describe(path, fleet)
        self._settings = settings
        self._pace = pace
        self._crew = crew
        self._redis: Any = connect(settings)
        self._seen = 0.0
        scaler = Scaler(
            self._fleet, settings, cold_start=pace.cold_start, hold=pace.hold, from_zero=True, by_replica=False
        )
        try:
            self.service = ScalerService(scaler, interval=pace.interval, address=LOOPBACK, port=port)
        except OSError as error:
            raise UsageError(
                f"cannot serve on {LOOPBACK}:{port} ({error.strerror}); choose another --scaler-port"
            ) from None
        self._scaler = scaler

    @property
    def url(self) -> str:
        """The URL of the scaler."""
        return f"http://{LOOPBACK}:{self.service.port}"

    def start(self) -> None:
        """Start a thread that looks at the queues."""
        self.service.__enter__()

    def stop(self) -> None:
        """Stop looking. Call it once, and only after `start`."""
        self.service.__exit__()
        self._redis.close()

    def follow(self, path: Path, fleet: Fleet) -> None:
        """Scale the pools of this fleet from now on; its file is at `path`."""
        self._describe(path, fleet)
        self._scaler.follow(self._fleet)

    def _describe(self, path: Path, fleet: Fleet) -> None:
        unlimited = pools_without_maximum(path)
        fleet, limited = within_the_host(fleet, unlimited)
        unlimited -= limited
        self._fleet = _up_to_the_cores(fleet, unlimited, self._cores)
        self._sharing = {key for key, pool in self._fleet.revisions.items() if pool.name in unlimited}

    def step(self) -> None:
        """Start and drain workers if there is a new reading. Returns at once."""
        try:
            statuses = self._scaler.statuses(younger=3 * self._pace.interval)
            read_at = max((status.reading.now for status in statuses.values()), default=self._seen)
            if read_at == self._seen:
                return
            self._seen = read_at
            self._announce()
            # The last reading may belong to the fleet before its last change.
            self._follow({name: one for name, one in statuses.items() if name in self._fleet.revisions})
        except ServiceUnavailableError:
            return  # the scaler's log reports it, and running workers go on

    def _follow(self, statuses: Mapping[str, PoolStatus]) -> None:
        wanted = {name: status.decision.desired for name, status in statuses.items()}
        waits = {name: one.measured.signal.queued + one.measured.signal.leased for name, one in statuses.items()}
        for name, target in share(wanted, waits, sharing=self._sharing, cores=self._cores).items():
            have = self._crew.of(name)
            if target == len(have):
                continue
            say(f"pool {name}: {len(have)} -> {_workers(target)}, {_reason(statuses[name])}", pool=name)
            for _ in range(target - len(have)):
                self._crew.start(name)
            if target < len(have):
                self._crew.shrink(name, len(have) - target, order=least_useful(have, self._held(name)))

    def _held(self, name: str) -> Counter[int]:
        """The number of messages that each process of this machine holds, by process id."""
        key = ledger_keys(queue_name(self._fleet.pool(name), self._fleet))["owners_key"]
        with redis_errors(self._settings.redis_url):
            owners = [value.decode(errors="replace").split(":") for value in self._redis.hvals(key)]
        here = socket.gethostname()
        return Counter(int(one[1]) for one in owners if one[0] == here and len(one) > 1 and one[1].isdecimal())

    @property
    def announced_seconds(self) -> float:
        """The seconds for which clients believe an announcement of the autoscaler."""
        return max(30.0, 3 * self._pace.interval)

    def _announce(self) -> None:
        """Announce the pools to producers without a fleet file, also while no worker is there to announce them."""
        with redis_errors(self._settings.redis_url):
            for pool in self._fleet.revisions.values():
                fields = announcement(pool, self._fleet)
                announce_pool(self._redis, pool.name, fields, seconds=self.announced_seconds)


def share(
    wanted: Mapping[str, int], waits: Mapping[str, float], *, sharing: Collection[str], cores: int
) -> dict[str, int]:
    """The number of workers of each pool: the wanted number, but the pools in `sharing` share the cores that the others leave.

    Each pool in `sharing` that wants workers gets one, however few cores there are. The remaining cores go to the pools with most
    waiting work for each worker.
    """
    given = {name: min(number, 1) if name in sharing else number for name, number in wanted.items()}
    while sum(given.values()) < cores:
        short = [name for name in sharing if given.get(name, 0) < wanted.get(name, 0)]
        if not short:
            break
        given[max(sorted(short), key=lambda name: waits[name] / max(1, given[name]))] += 1
    return given


def least_useful(workers: Iterable[WorkerProcess], held: Mapping[int, int]) -> list[WorkerProcess]:
    """The workers in the order in which they should end: the fewest held messages first; of equals, the youngest first."""
    return sorted(workers, key=lambda worker: (held.get(worker.child.pid, 0) if worker.child else 0, -worker.number))


def pools_without_maximum(path: Path) -> set[str]:
    """The pools of a fleet file that set no maximum number of workers."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))["pools"]
    return {name for name, table in tables.items() if "max" not in table.get("workers", {})}


def within_the_host(fleet: Fleet, unlimited: Collection[str], gpus: Count = visible_gpus) -> tuple[Fleet, set[str]]:
    """The fleet, whose pools with `devices` have at most the workers that these have room for; and the names of these pools.

    The pools in `unlimited` have as many.
    """

    def bounded(pool: Pool, room: int) -> Pool:
        most = room if pool.name in unlimited else min(pool.workers.max, room)
        previous = tuple(bounded(one, room) for one in pool.previous)
        return replace(pool, workers=WorkerRange(min(pool.workers.min, most), most), previous=previous)

    rooms = {name: room for name, pool in fleet.pools.items() if (room := room_of(pool, gpus)) is not None}
    pools = {name: bounded(pool, rooms[name]) if name in rooms else pool for name, pool in fleet.pools.items()}
    return Fleet(pools), set(rooms)


def _up_to_the_cores(fleet: Fleet, names: Collection[str], cores: int) -> Fleet:
    """The fleet, with the number of cores as the maximum of the pools with these names."""

    def unlimited(pool: Pool) -> Pool:
        previous = tuple(unlimited(one) for one in pool.previous)
        return replace(pool, workers=WorkerRange(pool.workers.min, max(cores, 1)), previous=previous)

    return Fleet({name: unlimited(pool) if name in names else pool for name, pool in fleet.pools.items()})


def _workers(number: int) -> str:
    return f"{number} worker" if number == 1 else f"{number} workers"


def _reason(status: PoolStatus) -> str:
    """The reason for the number of workers, for a reader of the log."""
    signal, messages = (
        status.measured.signal,
        sum(status.reading.count(state) for state in ("queued", "leased", "delayed")),
    )
    if not messages:
        return "no work waits"
    if status.measured.seconds_per_cost is None:
        return f"{messages} {'message' if messages == 1 else 'messages'} of unknown length to do"
    held = f", workers hold {signal.leased:.0f} s" if signal.leased else ""
    return f"{signal.queued:.0f} s of work waits{held}"
