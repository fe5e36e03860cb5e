"""Worker processes of one host: one child each; a worker is ready when it has written its ready file.

    Crew: pool ─▶ Squad (one description of the pool) ─▶ WorkerProcess on its device, WorkerProcess, …
          assign ─▶ the old squad is replaced ─▶ dismiss ─▶ its workers drain ─▶ gone

`Stack`, `Follower` and `Autoscaler` call `Crew`, and so does `Supervisor` for `pipefleet worker --devices`. Dead workers are
restarted by `Crew.step`; they raise nothing.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipefleet_workers.fleet.local.children import Child, ChildSpec
from pipefleet_workers.fleet.local.edits import Duty
from pipefleet_workers.fleet.local.parked import Parked
from pipefleet_workers.fleet.local.part import ChildPart, Yard
from pipefleet_workers.fleet.local.relay import Relay
from pipefleet_workers.fleet.local.restarts import Restarts
from pipefleet_workers.fleet.local.spread import emptiest, misplaced, surplus
from pipefleet_workers.observe.logs import say

WorkerCommand = Callable[[str, Path], Sequence[str]]
"""(pool, ready file) -> the command line of one worker, which creates the file once it consumes; `--device` may be added to it."""
RelayOf = Callable[["WorkerProcess"], Relay]
"""Where the output of a worker goes."""
METRICS_PORT = "PIPEFLEET_WORKER_METRICS_PORT"


def worker_command(pool: str, ready_file: Path, *, allow_unpinned: bool = False) -> list[str]:
    """The command line of pipefleet's own worker for `pool`."""
    unpinned = ["--allow-unpinned"] if allow_unpinned else []
    return [sys.executable, "-m", "pipefleet", "worker", "--pool", pool, "--ready-file", str(ready_file), *unpinned]


class WorkerProcess(ChildPart[Yard]):
    """Worker number `number` (from 1, counted over the crew) for `pool`; `restarts` counts its deaths.

    It runs on `device`; None if it chooses one itself. `drained_at` is the time at which it was told to end for good (monotonic
    seconds); None before.
    """

    def __init__(
        self,
        site: Yard,
        pool: str,
        *,
        number: int,
        command: WorkerCommand,
        restarts: Restarts,
        device: str | None = None,
    ) -> None:
        super().__init__(f"worker-{pool}-{number}", site)
        self.pool = pool
        self.number = number
        self.device = device
        self.served = False
        """Whether it was ever ready."""
        self.restarts = restarts
        self.last_words = ""
        """How its process ended the last time, on one line."""
        self.drained_at: float | None = None
        self._command = command
        self._ready_file = site.folder("run") / f"{self.name}.ready"

    @property
    def title(self) -> str:
        """Its name in messages, with its device."""
        return f"{self.name} on {self.device}" if self.device else self.name

    def start(self, environment: Mapping[str, str], *, grace: float, relay: Relay | None = None) -> None:
        """Start the process without waiting for it. At the stop it gets `grace` seconds to finish."""
        device = ["--device", self.device] if self.device else []
        self._ready_file.unlink(missing_ok=True)
        self.child = self._site.children.start(
            ChildSpec(
                name=self.title,
                argv=[*self._command(self.pool, self._ready_file), *device],
                cwd=self._site.cwd or self._site.data,
                log=self._site.log(self.name),
                env={**environment, **self._own_port(environment), "PYTHONUNBUFFERED": "1"},
                rank=1,
                grace=grace,
                keep=self._site.lock,
                relay=relay,
            )
        )

    def restart(self) -> None:
        """Start the ended process again, as before; its log is kept as `.1`."""
        assert self.child is not None
        self._ready_file.unlink(missing_ok=True)
        self.restarts.started()
        self.child.start()

    def ended(self) -> bool:
        """Whether its process is over."""
        assert self.child is not None
        return self.child.ended()

    def answers(self) -> bool:
        """Whether its process lives and consumes."""
        return not self.ended() and self._answers()

    def bury(self) -> str:
        """How its process ended, in words for people; the short form is kept as `last_words`."""
        assert self.child is not None
        self.last_words = self.child.last_words()
        return self.child.epitaph()

    def drain(self) -> None:
        """Tell the process to end for good: it finishes its work or gives it back. Returns at once."""
        assert self.child is not None
        self.drained_at = time.monotonic()
        self.child.terminate()

    def gone(self) -> bool:
        """Whether a drained process has ended; a process that outlives its grace is killed."""
        assert self.child is not None
        if self.drained_at is None:
            return False
        if not self.child.ended() and time.monotonic() - self.drained_at > self.child.spec.grace:
            self.child.finish()
        return self.child.ended()

    def _own_port(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Workers of one machine cannot share a port: the first gets the named port, the others the ports after it."""
        first = environment.get(METRICS_PORT, "0")
        return {METRICS_PORT: str(int(first) + self.number - 1)} if first.isdecimal() and int(first) else {}

    def _answers(self) -> bool:
        return self._ready_file.exists()


@dataclass(eq=False)
class Squad:
    """The workers of one pool that were started with one description of it, which sets their `environment` and their `duty`.

    They are spread over `devices`; if there are none, each finds its own.
    """

    pool: str
    environment: Mapping[str, str] = field(default_factory=dict)
    duty: Duty | None = None
    devices: tuple[str, ...] = ()
    workers: list[WorkerProcess] = field(default_factory=list)
    replaced: bool = False
    """Whether another squad, or none, serves the pool from now on."""
    closed: bool = False
    """Whether no more workers start in it; it is forgotten when its last worker has ended."""

    def staying(self) -> list[WorkerProcess]:
        """Its workers that were not told to end, in order of start."""
        return [worker for worker in self.workers if worker.drained_at is None]

    def ready(self) -> bool:
        """Whether every worker that should stay consumes; true if there is none."""
        return all(worker.answers() for worker in self.staying())


class Crew:
    """The workers of a host, by pool; an iterator over all of them. One thread at a time may call it.

    `clock` gives monotonic seconds; the pauses before a worker's restart follow it. `relay` takes the output of the workers;
    without it each has a log of its own. `retried` tells people when a parked worker is tried again.
    """

    def __init__(
        self,
        site: Yard,
        environment: Mapping[str, str],
        *,
        command: WorkerCommand,
        grace: float,
        clock: Callable[[], float] = time.monotonic,
        relay: RelayOf | None = None,
        retried: str = "when the fleet file changes its pool, and after kill -HUP",
    ) -> None:
        self._site = site
        self._environment = environment
        self._command = command
        self._grace = grace
        self._clock = clock
        self._relay = relay
        self._retried = retried
        self._current: dict[str, Squad] = {}
        self._replaced: list[Squad] = []

    def __iter__(self) -> Iterator[WorkerProcess]:
        squads = [*self._current.values(), *self._replaced]
        return iter([worker for squad in squads for worker in squad.workers])

    @property
    def replaced(self) -> tuple[Squad, ...]:
        """The squads that should end, in the order in which they were replaced."""
        return tuple(self._replaced)

    def current(self, pool: str) -> Squad | None:
        """The squad that serves a pool, or None."""
        return self._current.get(pool)

    def of(self, pool: str) -> list[WorkerProcess]:
        """The workers of a pool that were not told to end, in order of start; without workers of a replaced squad."""
        squad = self._current.get(pool)
        return [] if squad is None else squad.staying()

    def assign(
        self, pool: str, *, environment: Mapping[str, str], duty: Duty | None = None, devices: tuple[str, ...] = ()
    ) -> None:
        """Start workers of `pool` like this from now on; the workers before become a replaced squad, which goes on.

        A replaced squad with the same duty takes its place again.
        """
        self.retire(pool)
        squad = next((one for one in self._replaced if (one.pool, one.duty) == (pool, duty) and one.staying()), None)
        if squad is None:
            squad = Squad(pool)
        else:
            self._replaced.remove(squad)
        squad.duty, squad.environment, squad.replaced, squad.closed = duty, environment, False, False
        squad.devices = devices
        self._current[pool] = squad

    def retire(self, pool: str) -> None:
        """No new workers serve `pool`; its workers become a replaced squad, which goes on until it is dismissed."""
        squad = self._current.pop(pool, None)
        if squad is not None:
            squad.replaced = True
            self._replaced.append(squad)
            for worker in squad.staying():
                if worker.restarts.parked:
                    squad.closed = True
                    worker.drain()

    def dismiss(self, squad: Squad) -> None:
        """Tell all workers of a replaced squad to end, and forget the squad once they have ended."""
        for worker in squad.staying():
            worker.drain()
        squad.closed = True

    def start(self, pool: str, *, squad: Squad | None = None) -> WorkerProcess:
        """Start one more worker in the squad that serves the pool, or in `squad`. Returns without waiting for it.

        It gets the lowest free number, and the emptiest device of the squad.
        """
        squad = squad or self._current.setdefault(pool, Squad(pool))
        taken = {worker.number for worker in self}
        number = next(number for number in itertools.count(1) if number not in taken)
        everybody = [one for one in self if one.drained_at is None]
        device = emptiest(squad.devices, squad.staying(), everybody)
        restarts = Restarts(self._clock)
        worker = WorkerProcess(self._site, pool, number=number, command=self._command, restarts=restarts, device=device)
        squad.workers.append(worker)
        relay = None if self._relay is None else self._relay(worker)
        worker.start({**self._environment, **squad.environment}, grace=self._grace, relay=relay)
        return worker

    def move(self, pool: str, devices: tuple[str, ...], *, most: int) -> None:
        """Spread the pool's workers over these devices from now on; drain those elsewhere, and those beyond `most` on a device."""
        squad = self._current[pool]
        squad.devices = devices
        for worker in misplaced(squad.staying(), devices, most) if devices else ():
            worker.drain()

    def shrink(self, pool: str, number: int, *, order: Sequence[WorkerProcess] = ()) -> None:
        """Drain `number` workers of a pool, so that the others stay evenly spread; in this order, or the youngest first."""
        for worker in surplus(order or self.of(pool)[::-1], number):
            worker.drain()

    def has(self, child: Child) -> bool:
        """Whether a process belongs to one of its workers."""
        return any(worker.child is child for worker in self)

    def step(self) -> None:
        """Reap drained workers that have ended; restart other ended workers when they are due. Returns at once."""
        for squad in (*self._current.values(), *self.replaced):
            for worker in tuple(squad.workers):
                self._look_after(worker, squad)
            if squad.closed and not squad.workers:
                self._replaced.remove(squad)

    def retry(self, pool: str | None = None) -> None:
        """Forget the deaths of the workers of a pool, or of all pools; workers that wait for their restart are due at once."""
        for worker in self:
            if pool in (None, worker.pool):
                worker.restarts.forgive()

    def silent_pools(self) -> list[str]:
        """The pools that have workers, but none that is ready."""
        squads = {pool: self.of(pool) for pool in self._current}
        return [pool for pool, workers in squads.items() if workers and not any(one.answers() for one in workers)]

    def parked(self) -> dict[str, Parked]:
        """The pools with workers that ended too often; for each, how the first of them ended."""
        found = {}
        for pool in self._current:
            workers = self.of(pool)
            down = [worker for worker in workers if worker.restarts.parked]
            if down:
                found[pool] = Parked(len(down), len(workers), down[0].last_words)
        return found

    def _look_after(self, worker: WorkerProcess, squad: Squad) -> None:
        if worker.drained_at is not None:
            if worker.gone():
                worker.stop()
                squad.workers.remove(worker)
        elif not worker.ended():
            if worker.answers():
                worker.served = True
                if worker.restarts.ready():
                    say(f"{worker.title} is ready again", pool=worker.pool)
        elif not worker.restarts.waiting:
            self._mourn(worker, squad)
        elif worker.restarts.due:
            worker.restart()

    def _mourn(self, worker: WorkerProcess, squad: Squad) -> None:
        epitaph = worker.bury()
        pause, deaths = worker.restarts.died(), worker.restarts.deaths
        if not worker.restarts.parked:
            note = f"starting it again in {pause:g} s"
        elif squad.replaced:
            note = f"it ended {deaths} times in a row and is not started again: the pool has a new description"
            squad.closed = True
            worker.drain()
        else:
            others = sum(not one.restarts.waiting for one in squad.staying())
            note = (
                f"it ended {deaths} times in a row and stays down; {others} of {len(squad.staying())} workers of the pool "
                f"go on. It is tried again in {pause / 60:g} minutes, {self._retried} {os.getpid()}"
            )
        say(epitaph, trouble=True, pool=worker.pool)
        say(f"{worker.title}: {note}", trouble=True, pool=worker.pool)
