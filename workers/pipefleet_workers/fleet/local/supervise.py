"""`pipefleet worker --devices`: one worker process for each device of a host, or several, supervised as one worker.

    start all ─▶ look again and again: restart the dead, one ready file for all ─▶ SIGTERM ─▶ drain all ─▶ one exit code

`cli` calls `supervise`. The workers are children in a `Crew`, as under `pipefleet up`; their output becomes one log. A host that
lacks a device, or has no port for each worker's metrics, raises UsageError before anything starts.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipefleet.errors import UsageError
from pipefleet.fleet.devices import CPU, Devices, shown
from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.command import reload_on_sighup
from pipefleet_workers.fleet.local.files import write_private
from pipefleet_workers.fleet.local.part import Yard
from pipefleet_workers.fleet.local.relay import LAST_SECONDS, Relay
from pipefleet_workers.fleet.local.workers import METRICS_PORT, Crew, WorkerCommand, WorkerProcess
from pipefleet_workers.observe import logs
from pipefleet_workers.observe.logs import say
from pipefleet_workers.process.host import Count, absent_devices, host_devices, visible_gpus
from pipefleet_workers.process.ready_file import claim

USAGE = UsageError.exit_code
"""The exit code of a worker that cannot start as it was told to, such as with a model that does not load."""
KILLED = 128
"""Added to the number of a signal, this is the exit code of a process that it ended, as in a shell."""
_LOOK_SECONDS = 0.1
_HIGHEST_PORT = 65_535
_HURRIED = (signal.SIGTERM, signal.SIGQUIT, signal.SIGKILL)
"""What the workers get at the first signal, the second and the third: drain, give everything back at once, end."""


def supervise(
    pool: str,
    devices: Devices,
    per_device: int,
    options: Sequence[str],
    *,
    ready_file: Path | None,
    threads: int | None,
    gpus: Count = visible_gpus,
) -> int:
    """Run workers of `pool` with these command line options on each of the host's `devices`. Returns an exit code.

    Without `threads`, workers on the CPU share its cores. Raises UsageError if the host cannot run all of them.
    """
    names = host_devices(devices, gpus)
    number = len(names) * per_device
    _require(devices, number, gpus)
    if threads is None and names == (CPU,) and number > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _cores() // number)
    options = options if threads is None else [*options, f"--threads={threads}"]

    def command(_: str, ready: Path) -> Sequence[str]:
        return [sys.executable, "-m", "pipefleet", "worker", f"--ready-file={ready}", *options]

    with tempfile.TemporaryDirectory(prefix="pipefleet-") as folder:
        yard = Yard(Path(folder), Children(), cwd=Path.cwd())
        crew = crew_of(yard, pool, names, per_device, command)
        return Supervisor(yard, crew, pool, number, ready_file).run()


def _require(devices: Devices, number: int, gpus: Count) -> None:
    if absent := absent_devices(devices, gpus):
        raise UsageError(
            f"there is no device {', '.join(absent)} here, as `devices` = {shown(devices)} wants: torch sees {gpus()} GPUs; "
            "name others with --devices, or all"
        )
    first = os.environ.get(METRICS_PORT, "0")
    if first.isdecimal() and int(first) and int(first) + number - 1 > _HIGHEST_PORT:
        raise UsageError(
            f"{METRICS_PORT} must be at most {_HIGHEST_PORT - number + 1}, since {number} workers take a port each from there on"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def crew_of(yard: Yard, pool: str, names: tuple[str, ...], per_device: int, command: WorkerCommand) -> Crew:
    """A crew without workers, which is to spread them over these devices. What they print goes to stderr, labelled."""
    lock, output = threading.Lock(), sys.stderr.buffer

    def relay(worker: WorkerProcess) -> Relay:
        # Workers start device by device in turn, so the number tells which of its device's workers this is.
        which = f" #{1 + (worker.number - 1) // len(names)}" if per_device > 1 else ""
        return Relay(f"{worker.device}{which}", output, lock=lock, as_json=logs.as_json())

    # No limit of its own: whoever stops this process has one, and then the kernel ends the workers too.
    crew = Crew(yard, dict(os.environ), command=command, grace=math.inf, relay=relay, retried="and after kill -HUP")
    crew.assign(pool, environment={}, devices=names)
    return crew


class Supervisor:
    """`number` workers of one pool as one: one ready file, one end. `run` blocks until a signal, or until nothing can go on."""

    def __init__(self, yard: Yard, crew: Crew, pool: str, number: int, ready_file: Path | None) -> None:
        self._yard, self._crew, self._pool, self._number = yard, crew, pool, number
        self._ready_file = ready_file
        self._ready = False
        self._complaint = ""
        self._signals = 0

    def run(self) -> int:
        """Start the workers and look after them. Returns the exit code; no child is left."""
        if self._ready_file is not None:
            claim(self._ready_file)
        before = self._catch_signals()
        try:
            for _ in range(self._number):
                self._crew.start(self._pool)
            say(f"{self._number} workers start: {', '.join(worker.title for worker in self._crew)}", pool=self._pool)
            code = self._look_after()
            self._tell_ready(False)
            return self._end(code)
        finally:
            self._yard.children.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look_after(self) -> int:
        """Look again and again until a signal comes, or until the workers cannot go on; returns the code of that, or 0."""
        while not self._signals:
            if code := self._hopeless():
                return code
            self._crew.step()
            squad = self._crew.current(self._pool)
            self._tell_ready(squad is not None and squad.ready())
            time.sleep(_LOOK_SECONDS)
        return 0

    def _hopeless(self) -> int:
        """The exit code if no worker can go on: one can never start as it was told to, or all ended again and again. Else 0."""
        workers = self._crew.of(self._pool)
        for worker in workers:
            if not worker.served and worker.ended() and not worker.restarts.waiting and _code(worker) == USAGE:
                say(f"{worker.bury()} before it was ever ready, so all workers end", trouble=True, pool=self._pool)
                return USAGE
        if all(worker.restarts.parked and worker.ended() for worker in workers):
            say("all workers ended again and again, so this process ends", trouble=True, pool=self._pool)
            return _code(workers[0]) or 1
        return 0

    def _end(self, code: int) -> int:
        """Drain all workers, harder at each further signal. Returns `code`, or else the code of the first that did not drain."""
        alive = [worker for worker in self._crew if not worker.ended()]
        for worker in alive:
            worker.drain()
        told = 1
        while not all(worker.ended() for worker in alive):
            if told < min(max(1, self._signals), len(_HURRIED)):
                self._hurry(alive, _HURRIED[told])
                told += 1
            time.sleep(_LOOK_SECONDS)
        # A worker that is told to end while it loads its model has nothing to drain.
        self._pass_on_last_words(alive)
        codes = [0 if _code(worker) == KILLED + signal.SIGTERM else _code(worker) for worker in alive]
        return code or next(filter(None, codes), 0)

    def _pass_on_last_words(self, workers: Sequence[WorkerProcess]) -> None:
        """Wait for the last lines of workers that have ended, though not for long: a reader of the log may hang."""
        deadline = time.monotonic() + LAST_SECONDS
        for worker in workers:
            if worker.child is not None and worker.child.spec.relay is not None:
                worker.child.spec.relay.finish(max(0.0, deadline - time.monotonic()))

    def _hurry(self, workers: Sequence[WorkerProcess], number: signal.Signals) -> None:
        say(f"another signal: the workers get {number.name}", trouble=True, pool=self._pool)
        for worker in workers:
            assert worker.child is not None
            worker.child.terminate(number)

    def _tell_ready(self, ready: bool) -> None:
        """Write the ready file when all workers are ready, and remove it when one is not."""
        if ready != self._ready:
            say(f"{'all' if ready else 'not all'} of {self._number} workers are ready", pool=self._pool)
        self._ready = ready
        if self._ready_file is None:
            return
        complaint = ""
        try:
            if not ready:
                self._ready_file.unlink(missing_ok=True)
            elif not self._ready_file.exists():
                write_private(self._ready_file, f"{os.getpid()}\n")
        except OSError as error:  # such as of a full disk: the workers go on, and the next look tries again
            complaint = f"cannot write --ready-file {self._ready_file}: {error.strerror}"
        if complaint and complaint != self._complaint:
            say(complaint, trouble=True, pool=self._pool)
        self._complaint = complaint

    def _catch_signals(self) -> Mapping[int, Any]:
        def asked(number: int, frame: Any) -> None:
            # A worker takes SIGQUIT alone for haste, and so does a supervisor.
            self._signals = max(self._signals + 1, 2 if number == signal.SIGQUIT else 1)

        before: dict[int, Any] = {
            number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
        }
        before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)
        reload_on_sighup(self._crew.retry, gone=lambda: asked(signal.SIGHUP, None))
        return before


def _code(worker: WorkerProcess) -> int:
    """The exit code of a worker that has ended, as a shell tells it."""
    assert worker.child is not None
    code = worker.child.code
    return code if code >= 0 else KILLED - code
