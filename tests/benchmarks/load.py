"""How much of the machine others used while something was measured, and the sentences that warn of it.

A load average counts our own processes as well. What others used is the busy time of our cores, less the CPU time of this process
and all its descendants; what a hypervisor gave to other machines is `stolen`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from tests.benchmarks.measurement import cpu_seconds

TOLERATED = 0.05
"""Share of the cores that others may use before a figure is called doubtful; the kernel's own work is about 0.01."""


@dataclass(frozen=True)
class Ticks:
    """Seconds so far: of the wall clock, of our cores by kind, and of our own processes."""

    wall: float
    busy: float
    stolen: float
    own: float

    @classmethod
    def now(cls) -> Ticks:
        """Read the counters of the cores that this process may use."""
        every = psutil.cpu_times(percpu=True)
        cores = [every[index] for index in os.sched_getaffinity(0) if index < len(every)]
        stolen = sum(getattr(core, "steal", 0.0) for core in cores)
        busy = sum(core.user + core.system + core.nice + getattr(core, "softirq", 0.0) for core in cores)
        return cls(time.monotonic(), busy, stolen, cpu_seconds(psutil.Process()))


def between(before: Ticks, after: Ticks, cores: int) -> dict[str, float]:
    """Seconds of wall time, and the cores that we, others, and a hypervisor's other guests used on average."""
    wall = max(1e-9, after.wall - before.wall)
    own = (after.own - before.own) / wall
    foreign = (after.busy - before.busy) / wall - own
    return {
        "seconds": round(wall, 2),
        "cores": cores,
        "own_cores": round(own, 2),
        "foreign_cores": round(max(0.0, foreign), 2),
        "stolen_cores": round((after.stolen - before.stolen) / wall, 2),
    }


@contextmanager
def observed() -> Iterator[dict[str, Any]]:
    """A dictionary that the end of the block fills, an interrupted one too: `between` and the load averages."""
    found: dict[str, Any] = {"load_before": round(os.getloadavg()[0], 2)}
    before = Ticks.now()
    try:
        yield found
    finally:
        found |= between(before, Ticks.now(), len(os.sched_getaffinity(0)))
        found["load_after"] = round(os.getloadavg()[0], 2)


def is_foreign(load: Mapping[str, Any]) -> bool:
    """True when others used more than `TOLERATED` of the cores."""
    used = load["foreign_cores"] + load["stolen_cores"]
    return bool(used > TOLERATED * load["cores"])


def warnings(section: str, rounds: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each round that did not have the machine for itself."""
    return [warning(section, one) for one in rounds if is_foreign(one)]


def warning(section: str, load: Mapping[str, Any]) -> str:
    """Who used what in a round of a section."""
    stolen = f", {load['stolen_cores']:.2f} of them other machines on the same host" if load["stolen_cores"] else ""
    used = load["foreign_cores"] + load["stolen_cores"]
    return (
        f"Round {load['round']} of `{section}` did not have the machine for itself: others used {used:.2f} of its "
        f"{load['cores']} cores{stolen} (load average {load['load_before']:.2f} before, {load['load_after']:.2f} after)."
    )
