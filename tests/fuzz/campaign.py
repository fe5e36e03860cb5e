"""A campaign: batches of drawn messages against one worker, the checks after each, and the search for the message that did it."""

from __future__ import annotations

import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from tests.fuzz import checks, messages
from tests.fuzz.checks import kind_of
from tests.fuzz.strategies import Burst, bursts
from tests.fuzz.world import World

Batch = Sequence[tuple[str, Burst]]
BATCH = 1000
"""Messages between two looks at everything."""


@dataclass(slots=True)
class Report:
    """What a batch did: how many messages, of which families, and what was wrong afterwards."""

    pushed: int = 0
    families: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    letters: int = 0
    worker_bytes: int = 0
    peak_bytes: int = 0
    redis_bytes: int = 0
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line for who watches."""
        mega = {"worker": self.worker_bytes, "peak": self.peak_bytes, "redis": self.redis_bytes}
        sizes = ", ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in mega.items())
        return f"{self.pushed} messages in {self.seconds:.1f} s, {self.letters} dead letters, {sizes}"


def draw(count: int, seed: int, families: Sequence[str] = ()) -> list[tuple[str, Burst]]:
    """`count` bursts, always the same for one seed under the same code."""
    found: list[tuple[str, Burst]] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(bursts(families))
    def collect(burst: tuple[str, Burst]) -> None:
        found.append(burst)

    collect()
    return found


class Campaign:
    """Plays batches in a world. The first one is what memory is compared with."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0
        self._first: Report | None = None
        self._resting = world.memory("VmRSS")
        self._redis_at_first = checks.redis_bytes(world)
        self._objects = world.objects()

    def play(self, batch: Batch, *, last: bool = False) -> Report:
        """Push a batch, wait until it has settled, and check everything; with `last`, a run as well."""
        world, began = self._world, time.monotonic()
        report = Report(families=Counter(name for name, _ in batch))
        log_start = world.log.stat().st_size
        world.forget_peak()
        pushed = self._push(batch)
        report.pushed = len(pushed)
        steps: list[Callable[[], list[str]]] = [
            lambda: checks.check_good_job(world),
            lambda: checks.check_settled(world),
            lambda: checks.check_alive(world),
            lambda: [] if report.wrong else checks.check_fates(world, [raw for _, raw in pushed]),
            lambda: checks.check_keys(world),
            lambda: checks.check_channels(world),
            lambda: checks.check_commands(world),
            lambda: checks.check_log(world, log_start),
            *([lambda: checks.check_run(world, self._number)] if last else []),
            self._store,
            lambda: self._sizes(report),
        ]
        for step in steps:
            report.wrong += first_of_each_kind(checks.guarded(step))
            if world.exit_code is not None:
                report.wrong = checks.check_alive(world)  # what else was found follows from it
                break
        report.seconds = time.monotonic() - began
        return report

    def _push(self, batch: Batch) -> list[tuple[int, bytes]]:
        pushed = []
        for _, burst in batch:
            self._number += 1
            own = {messages.ID: f"fuzz-{self._number}", messages.TAG: f"tag-{self._number}"}
            pushed += [(entry.step, messages.filled(entry.raw, {**self._world.names, **own})) for entry in burst]
        self._world.push(pushed)
        return pushed

    def _store(self) -> list[str]:
        before, self._objects = self._objects, self._world.objects()
        return checks.check_store(before, self._objects)

    def _sizes(self, report: Report) -> list[str]:
        """What the worker and Redis hold, against the first batch."""
        world = self._world
        report.letters = checks.count_letters(world)
        checks.purge_letters(world)
        report.worker_bytes, report.peak_bytes = world.memory("VmRSS"), world.memory("VmHWM")
        report.redis_bytes = checks.redis_bytes(world)
        self._first = self._first or report
        found = []
        if (grown := report.worker_bytes - self._first.worker_bytes) > checks.MOST_GROWTH:
            found.append(f"the worker has grown by {grown >> 20} MiB since the first batch")
        if (peak := report.peak_bytes - self._resting) > checks.MOST_PEAK:
            found.append(f"the worker held {peak >> 20} MiB more than before the first batch")
        if (data := report.redis_bytes - self._redis_at_first) > checks.MOST_DATA * (1 + self._number // BATCH):
            found.append(f"Redis holds {data >> 20} MiB more than before the first batch")
        return found


def first_of_each_kind(wrong: Sequence[str]) -> list[str]:
    """Findings, three of each kind."""
    found: dict[str, list[str]] = {}
    for one in wrong:
        found.setdefault(kind_of(one), []).append(one)
    return [one for kind in found.values() for one in kind[:3]]


def minimise(batch: Batch, kinds: set[str], say: Callable[[str], Any]) -> Batch:
    """The smallest part of a batch, found by halving, after which a finding of one of these kinds is there in a new world."""
    while len(batch) > 1:
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            found = {kind_of(one) for one in alone(half).wrong}
            if found & kinds:
                batch = half
                say(f"  {len(batch)} messages: {'; '.join(sorted(found & kinds))}")
                break
        else:
            say("  neither half does it by itself")
            break
    return batch


def alone(batch: Batch) -> Report:
    """A batch in a world of its own."""
    with tempfile.TemporaryDirectory(prefix="pipefleet-fuzz-") as folder, World(Path(folder)) as world:
        return Campaign(world).play(batch)


def keep(batch: Batch, path: Path) -> None:
    """Write a batch to a file that `--replay` takes."""
    path.write_bytes(pickle.dumps([(name, [(entry.raw, entry.step) for entry in burst]) for name, burst in batch]))


def kept(path: Path) -> list[tuple[str, Burst]]:
    """The reverse of `keep`."""
    from tests.fuzz.strategies import Entry

    stored = pickle.loads(path.read_bytes())
    return [(name, tuple(Entry(raw, step) for raw, step in burst)) for name, burst in stored]
