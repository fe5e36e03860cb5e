"""`python -m tests.benchmarks [WORKLOAD …]`: throughput side by side, and the producer's memory."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks import memory, system
from tests.benchmarks.contenders import CONTENDERS, Measurement, agree, in_subprocess
from tests.benchmarks.workloads import DEFAULT_COUNTS, WORKLOADS, Workload

SYSTEM = "pipefleet, whole system"


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=[*WORKLOADS, "memory"], help="texts, speech, memory")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, in turns (3)")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where the figures are written")
    arguments = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory(prefix="pipefleet-bench-") as folder:
        for name in arguments.workloads:
            print(f"\n{name}", flush=True)
            if name == "memory":
                report[name] = memory.measure((10_000, 1_000_000), Path(folder))
                for row in report[name]:
                    print("  planned {objects:>9,} objects: peak {peak_mib} MiB, {seconds} s".format(**row), flush=True)
            else:
                report[name] = compare(WORKLOADS[name](DEFAULT_COUNTS[name]), arguments.rounds, Path(folder))
    arguments.json.write_text(json.dumps(report, indent=2))
    print(f"\nfigures written to {arguments.json}")


def compare(workload: Workload, rounds: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Every contender in turns, `rounds` times; prints and returns items/s, spread, CPU and agreement."""
    runs: dict[str, list[Measurement]] = {name: [] for name in (*CONTENDERS, SYSTEM)}
    with system.running(workload, scratch) as (client, stack):
        for _ in range(rounds):
            for name in CONTENDERS:
                runs[name].append(in_subprocess(name, workload.name, len(workload.items), scratch))
            runs[SYSTEM].append(system.measure(client, stack, workload))
    reference = runs["pipeline one by one"]
    table = {name: _row(workload, measured, reference) for name, measured in runs.items()}
    _print(table)
    return table


def _row(workload: Workload, measured: list[Measurement], reference: list[Measurement]) -> dict[str, float]:
    rates = sorted(len(workload.items) / one.seconds for one in measured)
    base = statistics.median(len(workload.items) / one.seconds for one in reference)
    return {
        "items_per_second": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "ratio": statistics.median(rates) / base,
        "cpu_seconds": statistics.median(one.cpu_seconds for one in measured),
        "agreement": agree(workload, measured[0].outputs, reference[0].outputs),
    }


def _print(table: dict[str, dict[str, float]]) -> None:
    print(f"  {'':28} {'items/s':>9} {'(spread)':>15} {'ratio':>6} {'CPU s':>7} {'same':>6}")
    for name, row in table.items():
        spread = f"({row['lowest']:.1f}-{row['highest']:.1f})"
        print(
            f"  {name:28} {row['items_per_second']:9.1f} {spread:>15} {row['ratio']:6.2f} {row['cpu_seconds']:7.1f} "
            f"{row['agreement']:6.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
