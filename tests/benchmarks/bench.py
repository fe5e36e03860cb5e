"""The sections of the benchmark, and the stack of servers that those of one workload share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import compare, growth, memory, rounds, simulated, single, start, surroundings, system
from tests.benchmarks.contenders import TITLES
from tests.benchmarks.figures import Figures
from tests.benchmarks.measurement import Machine
from tests.benchmarks.rounds import Measure
from tests.benchmarks.system import System
from tests.benchmarks.workloads import COUNTS, QUICK_COUNTS, WORKLOADS, Workload

ROUNDS = 3
JOBS, QUICK_JOBS = 3000, 200
GROWTH_ITEMS, QUICK_GROWTH_ITEMS = 50_000, 3000
OBJECTS, QUICK_OBJECTS = (10_000, 1_000_000), (1000, 10_000)
GPU_TIMES, GPU_GROWS = 10, ("texts", "images", "speech")
ONE_ROUND = {"worker", "device", *map(str, OBJECTS), *map(str, QUICK_OBJECTS)}
"""Contenders of sections that one round is enough for: nothing is compared there."""
SECTIONS = (*WORKLOADS, "single", "worker-memory", "simulated", "memory", "start")
"""All sections, in the order in which they run."""


@dataclass(frozen=True)
class Options:
    """What the command line chose. `count` and `rounds` of None are each section's own; without `warm` no time counts."""

    contenders: tuple[str, ...] = tuple(TITLES)
    quick: bool = False
    again: bool = False
    warm: bool = True
    rounds: int | None = None
    count: int | None = None
    service: str = simulated.SERVICE
    picture: Path | None = None


class Bench:
    """Measures sections into `figures`; keeps a stack running while the next section wants the same workload."""

    def __init__(self, options: Options, machine: Machine, figures: Figures, scratch: Path) -> None:
        self._options = options
        self._machine = machine
        self._figures = figures
        self._scratch = scratch
        self._stamp = surroundings.stamp()
        self._held = contextlib.ExitStack()
        self._running: tuple[Workload, System] | None = None

    def close(self) -> None:
        """End the stack that runs."""
        self._running = None
        self._held.close()

    def measure(self, section: str) -> dict[str, Any]:
        """Measure a section as far as the file has not got it yet; its record."""
        facts, contenders, normal = self._sections()[section]() if section not in WORKLOADS else self._workload(section)
        record = self._figures.section(section, self._stamp, facts, again=self._options.again)
        wanted = self._options.rounds or (1 if self._options.quick else normal)
        rounds.measure(section, record, contenders, wanted, self._figures.save)
        return record

    def _sections(self) -> dict[str, Callable[[], tuple[dict[str, Any], dict[str, Measure | str], int]]]:
        """By section: the facts of its record, its contenders, and its rounds."""
        return {
            "single": self._single,
            "worker-memory": self._growth,
            "simulated": self._simulated,
            "memory": self._memory,
            "start": lambda: ({}, {"stack": self._without_servers(partial(start.measure, self._scratch))}, ROUNDS),
        }

    def _workload(self, name: str) -> tuple[dict[str, Any], dict[str, Measure | str], int]:
        usual = COUNTS[name] * (GPU_TIMES if self._machine.device != "cpu" and name in GPU_GROWS else 1)
        workload = WORKLOADS[name](self._options.count or (QUICK_COUNTS[name] if self._options.quick else usual))
        slow = min(usual, workload.slow_items or usual)
        facts = {
            "items": len(workload.items),
            "usual_items": {one: usual if one in compare.FAST else slow for one in TITLES},
            "processes": self._machine.processes,
        }
        running = partial(self._system, workload)
        ways = compare.Ways(workload, self._machine, self._scratch, running, warm=self._options.warm)
        return facts, ways.able(self._options.contenders), ROUNDS

    def _single(self) -> tuple[dict[str, Any], dict[str, Measure | str], int]:
        jobs = self._count(JOBS, QUICK_JOBS)
        workload = WORKLOADS["trivial"](QUICK_COUNTS["trivial"])
        able = single.contenders(partial(self._system, workload), workload, self._machine, self._scratch, jobs)
        chosen: dict[str, Measure | str] = {name: one for name, one in able.items() if name in self._options.contenders}
        return {"items": jobs, "usual": JOBS}, chosen, ROUNDS

    def _growth(self) -> tuple[dict[str, Any], dict[str, Measure | str], int]:
        workload = WORKLOADS["trivial"](self._count(GROWTH_ITEMS, QUICK_GROWTH_ITEMS))
        facts = {"items": len(workload.items), "usual": GROWTH_ITEMS}
        return facts, {"worker": lambda: growth.measure(self._system(workload), workload)}, 1

    def _simulated(self) -> tuple[dict[str, Any], dict[str, Measure | str], int]:
        count = self._count(simulated.PICTURES, simulated.QUICK_PICTURES)
        pictures = WORKLOADS["images"](min(count, COUNTS["images"]))
        one = partial(
            simulated.measure, simulated.simulated(pictures, count), self._machine, self._scratch,
            service=self._options.service, picture=self._options.picture,
        )  # fmt: skip
        facts = {"items": count, "usual": simulated.PICTURES, "service": self._options.service}
        return facts, {"device": self._without_servers(one)}, 1

    def _memory(self) -> tuple[dict[str, Any], dict[str, Measure | str], int]:
        counts = QUICK_OBJECTS if self._options.quick else OBJECTS
        able: dict[str, Measure | str] = {
            str(count): self._without_servers(partial(memory.measure, count, self._scratch)) for count in counts
        }
        return {"items": counts[-1], "usual": OBJECTS[-1]}, able, 1

    def _without_servers(self, one: Measure) -> Measure:
        """`one`, after the stack of the section before has ended."""

        def alone() -> Any:
            self.close()
            return one()

        return alone

    def _system(self, workload: Workload) -> System:
        if self._running is None or self._running[0] != workload:
            self.close()
            running = self._held.enter_context(system.running(workload, self._machine, self._scratch))
            system.warm(running, workload)
            self._running = (workload, running)
        return self._running[1]

    def _count(self, usual: int, quick: int) -> int:
        return self._options.count or (quick if self._options.quick else usual)
