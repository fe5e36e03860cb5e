"""All contenders on one workload: how each is measured, and whether its outputs are those of the pipeline one by one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import contenders, peer_celery, peer_litserve, system
from tests.benchmarks.agreement import agree
from tests.benchmarks.contenders import ALONE, CELERY, ENGINE, HAND, HANDS, LITSERVE, ONE_BY_ONE, SYSTEM, TITLES
from tests.benchmarks.measurement import Machine, Measurement
from tests.benchmarks.rounds import Measure
from tests.benchmarks.system import System
from tests.benchmarks.workloads import Workload

FAST = (HAND, HANDS, ENGINE, SYSTEM)
"""Contenders that get all items of a workload that limits the others."""


def share(name: str, workload: Workload) -> Workload:
    """The items that a contender gets."""
    return workload if name in FAST else workload.first(workload.slow_items)


@dataclass(frozen=True)
class Ways:
    """With what a workload is measured. `running` starts the servers; `warm` is False where no time counts."""

    workload: Workload
    machine: Machine
    scratch: Path
    running: Callable[[], System]
    warm: bool = True

    def able(self, chosen: Collection[str]) -> dict[str, Measure | str]:
        """How each of the `chosen` is measured, in the order of a round, or why it cannot be."""
        judge = Judge(self.workload, self._measured(ONE_BY_ONE))
        found: dict[str, Measure | str] = {}
        for name in TITLES:
            if name in chosen:
                found[name] = missing(name, self.machine) or partial(judge.judged, name, self._measured(name))
        return found

    def _measured(self, name: str) -> Callable[[], Measurement]:
        workload = share(name, self.workload)
        if name in ALONE:
            return partial(contenders.in_one_process, name, workload, self.machine, warm=self.warm)
        if name == HANDS:
            return partial(contenders.by_all_cores, workload, self.machine, warm=self.warm)
        return partial(self._with_servers, name, workload)

    def _with_servers(self, name: str, workload: Workload) -> Measurement:
        stack = self.running()
        if name == SYSTEM:
            return system.measure(stack, workload)
        servers = {part: process for part, process in stack.processes.items() if part != "worker"}
        peer = {CELERY: peer_celery.measure, LITSERVE: peer_litserve.measure}[name]
        return peer(workload, self.machine, self.scratch, servers)


def missing(name: str, machine: Machine) -> str | None:
    """Why a contender cannot run on this machine; None when it can."""
    if name == LITSERVE:
        return peer_litserve.missing()
    if name == HANDS and machine.processes == 1:
        return "one core: the same as the hand loop in one process"
    return None


def about() -> dict[str, str]:
    """What each contender is, by name: the docstring of its code."""
    subjects: dict[str, Any] = {
        **ALONE, HANDS: contenders.Hands, CELERY: peer_celery.measure, LITSERVE: peer_litserve.measure,
        SYSTEM: system.measure,
    }  # fmt: skip
    return {name: contenders.about(subjects[name]) for name in TITLES}


class Judge:
    """Compares outputs with those of the pipeline one by one, which runs once more where it is no contender."""

    def __init__(self, workload: Workload, one_by_one: Callable[[], Measurement]) -> None:
        self._workload = workload
        self._one_by_one = one_by_one
        self._reference: dict[str, Any] | None = None

    def judged(self, name: str, measure: Callable[[], Measurement]) -> Mapping[str, Any]:
        """One run, as the record holds it."""
        found = measure()
        if name == ONE_BY_ONE:
            self._reference = found.outputs
        elif self._reference is None:
            self._reference = self._one_by_one().outputs
        return {
            "items": len(found.outputs),
            "seconds": round(found.seconds, 4),
            "items_per_second": round(found.rate, 3),
            "cpu": {part: round(seconds, 4) for part, seconds in found.cpu.items()},
            "agreement": agree(self._workload, found.outputs, self._reference or {}),
        }
