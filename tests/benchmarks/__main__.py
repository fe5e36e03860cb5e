"""`make bench`: contenders side by side on four workloads, and what the system itself costs. Prints tables and writes JSON.

python -m tests.benchmarks texts images --rounds 3      some sections only
python -m tests.benchmarks --quick                      everything on a few items, once
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import growth, memory, report, simulated, single, system
from tests.benchmarks.compare import compare, contenders
from tests.benchmarks.measurement import Machine
from tests.benchmarks.system import System
from tests.benchmarks.workloads import COUNTS, QUICK_COUNTS, WORKLOADS, Workload

JOBS, QUICK_JOBS = 3000, 200
GROWTH_ITEMS, QUICK_GROWTH_ITEMS = 50_000, 3000
GPU_TIMES, GPU_GROWS = 10, ("texts", "images", "speech")
OBJECTS, QUICK_OBJECTS = (10_000, 1_000_000), (1000, 10_000)


class Bench:
    """Runs sections; keeps the last stack running while the next section wants the same workload."""

    def __init__(self, arguments: argparse.Namespace, machine: Machine, scratch: Path) -> None:
        self._arguments = arguments
        self._machine = machine
        self._scratch = scratch
        self._held = contextlib.ExitStack()
        self._running: tuple[Workload, System] | None = None

    def close(self) -> None:
        """End the stack that runs."""
        self._running = None
        self._held.close()

    def compare(self, name: str) -> dict[str, Any]:
        """The table of one workload."""
        workload = WORKLOADS[name](self._arguments.count or self._count(name))
        running = None if self._arguments.in_process else self._system(workload)
        rows = contenders(workload, self._machine, self._scratch, running)
        return compare(workload, rows, self._arguments.rounds or self._pick(3, 1))

    def single(self) -> dict[str, Any]:
        """Single jobs with the trivial model."""
        workload = self._trivial(self._pick(COUNTS, QUICK_COUNTS)["trivial"])
        jobs = self._arguments.count or self._pick(JOBS, QUICK_JOBS)
        return single.measure(self._system(workload), workload, self._machine, self._scratch, jobs)

    def growth(self) -> dict[str, Any]:
        """The worker's memory."""
        workload = self._trivial(self._arguments.count or self._pick(GROWTH_ITEMS, QUICK_GROWTH_ITEMS))
        return growth.measure(self._system(workload), workload)

    def simulated(self) -> dict[str, Any]:
        """The device's busy share."""
        self.close()
        pictures = WORKLOADS["images"](self._pick(COUNTS, QUICK_COUNTS)["images"])
        count = self._arguments.count or self._pick(simulated.PICTURES, simulated.QUICK_PICTURES)
        return simulated.measure(
            simulated.simulated(pictures, count), self._machine, self._scratch,
            service=self._arguments.simulated, picture=self._arguments.trace,
        )  # fmt: skip

    def producer_memory(self) -> list[dict[str, float]]:
        """The producer's memory."""
        self.close()
        rows = memory.measure(self._pick(OBJECTS, QUICK_OBJECTS), self._scratch)
        for row in rows:
            print("  planned {objects:>9,} objects: peak {peak_mib} MiB, {seconds} s".format(**row), flush=True)
        return rows

    def _system(self, workload: Workload) -> System:
        if self._running is None or self._running[0] != workload:
            self.close()
            running = self._held.enter_context(system.running(workload, self._machine, self._scratch))
            system.warm(running, workload)
            self._running = (workload, running)
        return self._running[1]

    def _count(self, name: str) -> int:
        """Items of a workload; on a GPU more of them, or it would be over before it has begun."""
        times = GPU_TIMES if self._machine.device.startswith("cuda") and name in GPU_GROWS else 1
        return int(self._pick(COUNTS, QUICK_COUNTS)[name]) * self._pick(times, 1)

    def _pick(self, full: Any, quick: Any) -> Any:
        return quick if self._arguments.quick else full

    @staticmethod
    def _trivial(count: int) -> Workload:
        return WORKLOADS["trivial"](count)


def sections(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Every section by name, in the order in which they run."""
    workloads: dict[str, Callable[[], Any]] = {name: partial(bench.compare, name) for name in WORKLOADS}
    return workloads | {
        "single": bench.single,
        "worker-memory": bench.growth,
        "simulated": bench.simulated,
        "memory": bench.producer_memory,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    known = [*WORKLOADS, "single", "worker-memory", "simulated", "memory"]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="few items and one round, to see that everything runs")
    parser.add_argument("--in-process", action="store_true", help="workloads only, without rows that need servers")
    parser.add_argument("--rounds", type=int, help="runs of each contender, in turns (3; quick: 1)")
    parser.add_argument("--count", type=int, help="items of each section (default: each section's own)")
    parser.add_argument("--device", default="auto", help="cpu or cuda:N (auto: the first GPU where there is one)")
    parser.add_argument("--dtype", default="float32", help="dtype of every contender's model (float32)")
    parser.add_argument("--threads", type=int, help="torch threads of every contender (all cores)")
    parser.add_argument(
        "--simulated", default=simulated.SERVICE, metavar="BASE,PER_COST", help="in seconds (%(default)s)"
    )
    parser.add_argument("--trace", type=Path, metavar="SVG", help="draw the trace of the section `simulated` there")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where figures go (%(default)s)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sections if name not in known]:
        parser.error(f"no section {', '.join(unknown)}; the sections are {', '.join(known)}")
    if not arguments.sections:
        arguments.sections = list(WORKLOADS) if arguments.in_process else known
    return arguments


def main() -> None:
    """Run the sections, print tables, write JSON after each, so that an interrupt loses one section at most."""
    arguments = parse()
    machine = Machine.detect(device=arguments.device, dtype=arguments.dtype, threads=arguments.threads)
    figures: dict[str, Any] = {"machine": report.surroundings(machine)}
    report.print_surroundings(figures["machine"])
    with tempfile.TemporaryDirectory(prefix="pipefleet-bench-") as folder:
        bench = Bench(arguments, machine, Path(folder))
        try:
            for name in arguments.sections:
                print(f"\n{name}", flush=True)
                figures[name] = sections(bench)[name]()
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        finally:
            bench.close()
    print(f"\nfigures written to {arguments.json}")


if __name__ == "__main__":
    main()
