"""`pipefleet up` follows its fleet file: pools appear, go, change or are resized, without disturbing the others.

    FleetEdits ─▶ Description ─▶ differences ─▶ Crew: start, resize, replace
                                                 replaced workers ─▶ told to end once nothing waits for them

`Stack.step` calls `Follower.step`. A changed pool is rolled: the new workers start beside the old workers. The old workers go on
until the new workers are ready and all work that only the old ones can do is done. Each version of the file is kept in a copy,
which its workers read; so a worker that dies meanwhile restarts with its own version. A wrong file is logged, and changes nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from pipefleet.connection.errors import redis_errors
from pipefleet.errors import ServiceUnavailableError, UsageError
from pipefleet.fleet.pools import Fleet, Pool, model_label
from pipefleet.fleet.revisions import waiting
from pipefleet_workers.fleet.local.edits import Description, Duty, FleetEdits
from pipefleet_workers.fleet.local.files import write_private
from pipefleet_workers.fleet.local.spread import devices_of, room_of
from pipefleet_workers.fleet.local.workers import Crew, Squad, WorkerProcess
from pipefleet_workers.observe.logs import say
from pipefleet_workers.process.host import Count, visible_gpus

LOOK_SECONDS = 1.0
"""Seconds between two looks at the messages that wait for replaced workers."""
QUIET_SECONDS = 6.0
"""For so long no message may have waited for replaced workers. A run that is being planned queues its next shard within this
time, and a client that has just read where jobs go sends its last jobs there.
"""
Outstanding = Callable[[Collection[str]], int]
"""The number of messages of these queues that wait or are with workers. Raises ServiceUnavailableError."""


class Follower:
    """Keeps the crew of a stack as the fleet file describes it. One thread at a time may call it.

    Each pool has `least` workers or its `workers.min`, whichever is more; with `least` 0 an autoscaler decides above the minimum. A
    pool with `devices` has as many workers as these have room for. `gpus` counts the GPUs of this host.
    `folder` takes the copies of the file. `changed` is called for every new version, with the path of its copy. Clients believe a
    worker's announcement for `believed` seconds: so long after a change they may send jobs to the replaced model. `clock` gives
    monotonic seconds.
    """

    def __init__(
        self,
        file: FleetEdits,
        folder: Path,
        *,
        least: int,
        outstanding: Outstanding,
        changed: Callable[[Path, Fleet], None] = lambda path, fleet: None,
        believed: float = 0.0,
        gpus: Count = visible_gpus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._folder = folder
        self._least = least
        self._outstanding = outstanding
        self._changed = changed
        self._believed = believed
        self._gpus = gpus
        self._clock = clock
        self._now: Description | None = None
        self._copy = folder
        self._look_at = clock()
        self._replaced_at: dict[Squad, float] = {}
        self._quiet_since: dict[Squad, float] = {}

    def begin(self, crew: Crew) -> list[WorkerProcess]:
        """Start the workers of the present file. Raises FleetFileError, or UsageError for a missing model folder."""
        for old in self._folder.glob("fleet-*.toml"):
            old.unlink()
        self._now = self._file.read()
        self._copy = self._keep(self._now)
        for name in self._now.fleet.revisions:
            self._assign(crew, self._now, name)
        self._changed(self._copy, self._now.fleet)
        _say_idle(self._now.fleet)
        pools = self._now.fleet.revisions
        return [crew.start(name) for name, pool in pools.items() for _ in range(self._wanted(pool))]

    def step(self, crew: Crew, *, reload: bool = False) -> None:
        """Take a new version of the file, and end replaced workers that no message waits for. Returns at once.

        With `reload` the file is read whether or not it seems to have changed, and parked workers are tried again.
        """
        if reload:
            crew.retry()
        try:
            description = self._file.news(at_once=reload)
        except UsageError as error:
            say(f"the fleet file is refused, everything goes on as before: {error}", trouble=True)
            description = None
        if description is not None:
            self._take(crew, description)
        if self._clock() >= self._look_at:
            now = self._clock()
            self._look_at = now + LOOK_SECONDS
            self._replaced_at = {squad: self._replaced_at.get(squad, now) for squad in crew.replaced}
            self._quiet_since = {squad: at for squad, at in self._quiet_since.items() if squad in self._replaced_at}
            for squad in crew.replaced:
                self._let_go(crew, squad)

    def _take(self, crew: Crew, new: Description) -> None:
        old = self._now
        assert old is not None
        if new == old:
            return
        self._now, self._copy = new, self._keep(new)
        before, after = old.fleet.revisions, new.fleet.revisions
        for name in before.keys() - after.keys():
            crew.retire(name)
            say(f"pool {name}: removed; its workers end when nothing waits for them", pool=name)
        for name, pool in after.items():
            if name not in before:
                self._add(crew, new, pool)
            elif new.duty(name) != old.duty(name):
                self._replace(crew, old, new, name)
            elif new.table(name) != old.table(name):
                self._resize(crew, pool)
        self._changed(self._copy, new.fleet)
        _say_idle(new.fleet)

    def _add(self, crew: Crew, new: Description, pool: Pool) -> None:
        self._assign(crew, new, pool.key)
        number = self._fill(crew, pool.key, self._wanted(pool))
        label = model_label(pool.model, pool.revision)
        say(f"pool {pool.key}: added, {pool.task} with {label}; {_start(number)}", pool=pool.key)

    def _replace(self, crew: Crew, old: Description, new: Description, name: str) -> None:
        pool, before = new.fleet.pool(name), len(crew.of(name))
        self._assign(crew, new, name)
        wanted = self._wanted(pool) if self._least else self._roomy(pool, max(before, pool.workers.min))
        number = self._fill(crew, name, wanted)
        say(
            f"pool {name}: {_difference(old.duty(name), new.duty(name))}; {_start(number)}, "
            "the former ones go on until these are ready and nothing waits for them alone",
            pool=name,
        )

    def _resize(self, crew: Crew, pool: Pool) -> None:
        crew.retry(pool.key)
        have = len(crew.of(pool.key))
        # An autoscaler has the new limits already, but its workers move to other devices here.
        wanted = self._wanted(pool) if self._least else self._roomy(pool, have)
        most = pool.workers_per_device if pool.devices is not None else max(have, wanted)
        crew.move(pool.key, devices_of(pool, self._gpus), most=most)
        moving = have - len(crew.of(pool.key))
        if have != wanted:
            say(f"pool {pool.key}: {have} -> {wanted} workers, by the fleet file", pool=pool.key)
        elif moving:
            say(f"pool {pool.key}: {moving} of {have} workers move to other devices, by the fleet file", pool=pool.key)
        self._fill(crew, pool.key, wanted)

    def _assign(self, crew: Crew, description: Description, name: str) -> None:
        files = {"PIPEFLEET_FLEET": str(self._copy), "PIPEFLEET_WORKER_FLEET_NOW": str(self._file.path)}
        devices = devices_of(description.fleet.pool(name), self._gpus)
        crew.assign(name, duty=description.duty(name), environment=files, devices=devices)

    def _fill(self, crew: Crew, name: str, wanted: int) -> int:
        """Start missing workers up to `wanted`, or drain the surplus; returns how many were started."""
        missing = max(0, wanted - len(crew.of(name)))
        for _ in range(missing):
            crew.start(name)
        crew.shrink(name, max(0, len(crew.of(name)) - wanted))
        return missing

    def _wanted(self, pool: Pool) -> int:
        room = room_of(pool, self._gpus)
        return room if self._least and room is not None else self._roomy(pool, max(self._least, pool.workers.min))

    def _roomy(self, pool: Pool, number: int) -> int:
        room = room_of(pool, self._gpus)
        return number if room is None else min(number, room)

    def _let_go(self, crew: Crew, squad: Squad) -> None:
        """Tell the workers of a replaced squad to end, once their successors are ready and no message waits only for them."""
        successor = crew.current(squad.pool)
        if (squad.closed and not squad.staying()) or (successor is not None and not successor.ready()):
            return
        queues = self._only_theirs(crew, squad)
        try:
            waits = self._outstanding(queues) if queues else 0
        except ServiceUnavailableError:
            return  # the stack itself watches the servers
        if waits:
            self._quiet_since.pop(squad, None)
            if not squad.staying() and not squad.closed:
                say(
                    f"pool {squad.pool}: {waits} messages wait for its former model, one worker starts", pool=squad.pool
                )
                crew.start(squad.pool, squad=squad)
        elif not queues or self._quiet(squad):
            crew.dismiss(squad)
            say(f"pool {squad.pool}: its former workers end, nothing waits for them", pool=squad.pool)

    def _quiet(self, squad: Squad) -> bool:
        """Whether no message has waited for a replaced squad for long enough, and no client sends it more."""
        now = self._clock()
        quiet = now - self._quiet_since.setdefault(squad, now) >= QUIET_SECONDS
        return quiet and now - self._replaced_at[squad] >= self._believed + QUIET_SECONDS

    def _only_theirs(self, crew: Crew, squad: Squad) -> frozenset[str]:
        """The queues that only a replaced squad serves, and no ready squad that stays."""
        assert self._now is not None
        served: set[str] = set()
        for name in self._now.fleet.revisions:
            successor = crew.current(name)
            if successor is not None and successor.ready():
                served |= self._now.duty(name).queues
        return frozenset() if squad.duty is None else squad.duty.queues - served

    def _keep(self, description: Description) -> Path:
        """Write the copy of a version that its workers read, under a name that no other version has."""
        text = description.to_toml()
        path = self._folder / f"fleet-{hashlib.sha256(text.encode()).hexdigest()[:12]}.toml"
        write_private(path, text)
        return path


def outstanding(redis: Any, url: str, queues: Iterable[str]) -> int:
    """The number of messages of `queues` that wait or are with workers. Raises ServiceUnavailableError."""
    with redis_errors(url):
        return sum(waiting(redis, queue) for queue in queues)


def _say_idle(fleet: Fleet) -> None:
    for name, sentence in fleet.idle_pools().items():
        say(sentence, trouble=True, pool=name)


def _difference(old: Duty, new: Duty) -> str:
    """How the workers of a pool differ from before, in words for people."""
    before, after = (model_label(one.pool.model, one.pool.revision) for one in (old, new))
    if before != after:
        return f"model {before} -> {after}"
    names = [name for name in type(new.pool).__dataclass_fields__ if getattr(old.pool, name) != getattr(new.pool, name)]
    return f"other {', '.join(names) or 'queue'}"


def _start(number: int) -> str:
    return "1 new worker starts" if number == 1 else f"{number or 'no'} new workers start"
