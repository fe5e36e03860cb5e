"""A crew of stand-ins for workers: processes that read their copy of the fleet file, say what they serve, and end when told to."""

from __future__ import annotations

import os
import signal
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.credentials import Credentials
from pipefleet_workers.fleet.local.edits import FleetEdits
from pipefleet_workers.fleet.local.follow import Follower
from pipefleet_workers.fleet.local.part import Site
from pipefleet_workers.fleet.local.ports import PortBook
from pipefleet_workers.fleet.local.workers import Crew, WorkerProcess
from tests.unit.fake_clock import Clock

FAKE_WORKER = """
import os, pathlib, sys, threading, time, tomllib
pool, ready = sys.argv[1], pathlib.Path(sys.argv[2])
with open(os.environ["PIPEFLEET_FLEET"], "rb") as file:
    name, _, previous = pool.partition("@")
    table = tomllib.load(file)["pools"][name]
model = pathlib.Path((table["previous"][0] if previous else table)["model"])
if (model / "broken").exists():
    sys.exit("this model is broken")
while (model / "slow").exists():
    time.sleep(0.01)
draft = ready.with_suffix(".draft")
draft.write_text(model.name)
draft.replace(ready)
threading.Event().wait()
"""


def fake_worker(pool: str, ready: Path) -> list[str]:
    """The command line of a stand-in; it serves the model of its pool, unless a file `broken` or `slow` lies in its folder."""
    return [sys.executable, "-S", "-c", FAKE_WORKER, pool, str(ready)]


def table(pool: str, model: str, *lines: str, task: str = "text-classification") -> str:
    """The table of one pool in a fleet file."""
    return "\n".join([f"[pools.{pool}]", f'task = "{task}"', f'model = "./{model}"', *lines, ""])


class FakeCrew:
    """A crew under a fleet file in `folder` of a host with `gpus`. Its clock stands still; `messages` lie in the queues."""

    def __init__(self, folder: Path, *tables: str, least: int = 1, believed: float = 0.0, gpus: int = 0) -> None:
        self.clock = Clock()
        self.path = folder / "fleet.toml"
        self.children = Children()
        self.messages: Counter[str] = Counter()
        self.versions: list[Path] = []
        for model in ("a", "b", "c"):
            (folder / model).mkdir()
        site = Site(folder, self.children, ports=PortBook(folder / "ports.json"), credentials=Credentials(*[""] * 6))
        self.crew = Crew(site, dict(os.environ), command=fake_worker, grace=10.0, clock=self.clock)
        self.follower = Follower(
            FleetEdits(self.path, clock=self.clock),
            site.folder("run"),
            least=least,
            outstanding=self._outstanding,
            changed=lambda path, fleet: self.versions.append(path),
            believed=believed,
            gpus=lambda: gpus,
            clock=self.clock,
        )
        self.write(*tables)

    def _outstanding(self, queues: Collection[str]) -> int:
        return sum(self.messages[queue] for queue in queues)

    def write(self, *tables: str) -> None:
        """Save the fleet file."""
        self.path.write_text("\n".join(tables))

    def begin(self) -> None:
        """Start the workers and wait until they are ready."""
        workers = self.follower.begin(self.crew)
        until(lambda: all(worker.answers() for worker in workers))

    def step(self, seconds: float = 0.0, *, reload: bool = False) -> None:
        """One look of the supervision, `seconds` after the one before."""
        self.clock.now += seconds
        self.crew.step()
        self.follower.step(self.crew, reload=reload)

    def take(self, *tables: str) -> None:
        """Save the fleet file and have it read."""
        self.write(*tables)
        self.step(reload=True)

    def steps_until(self, condition: Callable[[], bool]) -> None:
        """Look again and again, a second apart, until the condition holds."""

        def look() -> bool:
            self.step(1.0)
            return condition()

        until(look)

    def serving(self, pool: str) -> list[str]:
        """The models that the ready workers of a pool serve which were not told to end, sorted."""
        staying = [worker for worker in self.crew if worker.pool == pool and worker.drained_at is None]
        workers = [worker for worker in staying if worker.answers()]
        return sorted(worker._ready_file.read_text() for worker in workers)

    def pids(self, pool: str) -> list[int]:
        """The processes of a pool that were not told to end."""
        return [pid(worker) for worker in self.crew.of(pool)]

    def kill(self, worker: WorkerProcess) -> None:
        """Kill a worker's process and wait until it has ended."""
        os.kill(pid(worker), signal.SIGKILL)
        until(worker.ended)

    def stop(self) -> None:
        """End all processes."""
        self.children.stop()


def pid(worker: WorkerProcess) -> int:
    """The process of a worker."""
    assert worker.child is not None
    return worker.child.pid


def copy_of(worker: WorkerProcess) -> dict[str, object]:
    """What the fleet file says that a worker reads."""
    assert worker.child is not None
    return tomllib.loads(Path(worker.child.spec.env["PIPEFLEET_FLEET"]).read_text())


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.01)
