"""Worker processes of the stack: one child each, ready when the file appears that it was told to write."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pipefleet_workers.logs import say

from .children import Child, ChildSpec
from .errors import StackError
from .service import ChildService, Site

WorkerCommand = Callable[[str, Path], Sequence[str]]
"""(pool, ready file) -> the command line of one worker, which creates the file once it consumes."""
MAX_RESTARTS = 3
_METRICS_PORT = "PIPEFLEET_WORKER_METRICS_PORT"


def worker_command(pool: str, ready_file: Path) -> list[str]:
    """Return the command line of pipefleet's own worker for `pool`."""
    return [sys.executable, "-m", "pipefleet", "worker", "--pool", pool, "--ready-file", str(ready_file)]


class WorkerProcess(ChildService):
    """Worker number `number` (from 1, counted over the stack) for `pool`; keeps count of its `restarts`.

    `drained_at` is when it was told to end for good (seconds of the monotonic clock), None before.
    """

    def __init__(self, site: Site, pool: str, *, number: int, command: WorkerCommand) -> None:
        super().__init__(f"worker-{pool}-{number}", site)
        self.pool = pool
        self.number = number
        self.restarts = 0
        self.drained_at: float | None = None
        self._command = command
        self._ready_file = site.folder("run") / f"{self.name}.ready"

    def start(self, environment: Mapping[str, str], *, grace: float) -> None:
        """Start the process without waiting for it; `grace` is what it gets to finish at the stop, in s."""
        self._ready_file.unlink(missing_ok=True)
        self.child = self._site.children.start(
            ChildSpec(
                name=self.name,
                argv=self._command(self.pool, self._ready_file),
                cwd=self._site.data,
                log=self._site.log(self.name),
                env={**environment, **self._own_port(environment), "PYTHONUNBUFFERED": "1"},
                rank=1,
                grace=grace,
                keep=self._site.lock,
            )
        )

    def restart(self) -> None:
        """Start the ended process again, as before, and count it; its log is kept as `.1`."""
        assert self.child is not None
        self.restarts += 1
        self._ready_file.unlink(missing_ok=True)
        self.child.start()

    def drain(self) -> None:
        """Tell the process to end for good: it finishes or hands back what it holds. Returns at once."""
        assert self.child is not None
        self.drained_at = time.monotonic()
        self.child.terminate()

    def gone(self) -> bool:
        """Whether a drained process has ended; one that outlived its grace is killed."""
        assert self.child is not None
        if self.drained_at is None:
            return False
        if not self.child.ended() and time.monotonic() - self.drained_at > self.child.spec.grace:
            self.child.finish()
        return self.child.ended()

    def _own_port(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Workers of one machine cannot share a port: the first has the one that was named, the others those after it."""
        first = environment.get(_METRICS_PORT, "0")
        return {_METRICS_PORT: str(int(first) + self.number - 1)} if first.isdecimal() and int(first) else {}

    def _answers(self) -> bool:
        return self._ready_file.exists()


class Crew:
    """The workers of a stack; an iterator over all of them. One thread at a time may call it."""

    def __init__(self, site: Site, environment: Mapping[str, str], *, command: WorkerCommand, grace: float) -> None:
        self._site = site
        self._environment = environment
        self._command = command
        self._grace = grace
        self._workers: list[WorkerProcess] = []

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(tuple(self._workers))

    def of(self, pool: str) -> list[WorkerProcess]:
        """The workers of a pool that were not told to end, in order of start."""
        return [worker for worker in self._workers if worker.pool == pool and worker.drained_at is None]

    def start(self, pool: str) -> WorkerProcess:
        """Start one worker more, with the lowest number that is free, and return without waiting for it."""
        taken = {worker.number for worker in self._workers}
        number = next(number for number in itertools.count(1) if number not in taken)
        worker = WorkerProcess(self._site, pool, number=number, command=self._command)
        self._workers.append(worker)
        worker.start(self._environment, grace=self._grace)
        return worker

    def forget_drained(self) -> None:
        """Reap the drained workers that have ended."""
        for worker in self:
            if worker.gone():
                worker.stop()
                self._workers.remove(worker)

    def revive(self, child: Child) -> None:
        """Start the worker again whose process ended by itself, with a note.

        Raises StackError, with the end of its log, at the fourth time and for a process that is no worker's.
        """
        worker = next((one for one in self._workers if one.child is child), None)
        if worker is not None and worker.drained_at is not None:
            return
        if worker is None or worker.restarts >= MAX_RESTARTS:
            raise StackError(child.epitaph())
        note = f"starting it again ({worker.restarts + 1} of {MAX_RESTARTS})"
        say(f"{child.epitaph()}\n{note}", trouble=True)
        worker.restart()
