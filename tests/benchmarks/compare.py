"""All contenders on one workload, in turns; and the table that comes of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import peer_celery, peer_litserve, system
from tests.benchmarks.contenders import ENGINE, IN_PROCESS, LIMIT, ONE_BY_ONE, agree, in_subprocess
from tests.benchmarks.measurement import Machine, Measurement
from tests.benchmarks.system import System
from tests.benchmarks.workloads import Workload

WHOLE_SYSTEM = "pipefleet, whole system"
PEERS = (peer_celery.NAME, peer_litserve.NAME)
FAST = (LIMIT, ENGINE, WHOLE_SYSTEM)
"""Contenders that get all items of a workload that limits the others."""
ENOUGH = 0.95
"""Agreement below which a row's time does not count."""

Row = dict[str, Any]


def contenders(workload: Workload, machine: Machine, scratch: Path, running: System | None) -> dict[str, Any]:
    """By name, how each is measured, or the reason why it is not."""
    rows: dict[str, Callable[[], Measurement] | str] = {
        name: partial(in_subprocess, name, _share(name, workload), machine, scratch) for name in IN_PROCESS
    }
    if running is None:
        return rows
    for name, measure in {peer_celery.NAME: peer_celery.measure, peer_litserve.NAME: peer_litserve.measure}.items():
        rows[name] = partial(measure, _share(name, workload), machine, scratch)
    rows[WHOLE_SYSTEM] = partial(system.measure, running, workload)
    if reason := peer_litserve.missing():
        rows[peer_litserve.NAME] = reason
    return rows


def compare(workload: Workload, rows: Mapping[str, Any], rounds: int) -> dict[str, Row]:
    """Every row in turns, `rounds` times; prints and returns the table."""
    runs: dict[str, list[Measurement]] = {name: [] for name, one in rows.items() if not isinstance(one, str)}
    for _ in range(rounds):
        for name, measured in runs.items():
            measured.append(rows[name]())
    table: dict[str, Row] = {name: {"skipped": one} for name, one in rows.items() if isinstance(one, str)}
    reference = runs[ONE_BY_ONE][0].outputs
    table = {name: _row(workload, measured, reference) for name, measured in runs.items()} | table
    _add_ratios(table)
    print_table(table)
    return table


def _share(name: str, workload: Workload) -> Workload:
    return workload if name in FAST else workload.first(workload.slow_items)


def _row(workload: Workload, measured: list[Measurement], reference: dict[str, Any]) -> Row:
    rates = sorted(one.rate for one in measured)
    count = len(measured[0].outputs)
    shares = {name for one in measured for name in one.cpu}
    compared = {name: output for name, output in measured[0].outputs.items() if name in reference}
    return {
        "items": count,
        "items_per_second": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "cpu_seconds": statistics.median(one.cpu_seconds for one in measured),
        "cpu_us_per_item": {
            name: round(1e6 * statistics.median(one.cpu.get(name, 0.0) for one in measured) / count, 1)
            for name in sorted(shares)
        },
        "agreement": agree(workload, compared, reference),
    }


def _add_ratios(table: dict[str, Row]) -> None:
    """Ratios of medians: to the pipeline one by one, to the limit, to the best peer whose results are right."""
    rates = {name: row["items_per_second"] for name, row in table.items() if row.get("agreement", 0.0) >= ENOUGH}
    bases = {"ratio": rates.get(ONE_BY_ONE), "to_limit": rates.get(LIMIT)}
    bases["to_best_peer"] = max((rates[name] for name in PEERS if name in rates), default=None)
    for row in table.values():
        if "skipped" not in row:
            row |= {key: None if base is None else row["items_per_second"] / base for key, base in bases.items()}
            row["cpu_us_beyond_limit"] = round(_cpu(row) - _cpu(table[LIMIT]), 1)


def _cpu(row: Row) -> float:
    return float(sum(row["cpu_us_per_item"].values()))


def print_table(table: Mapping[str, Row]) -> None:
    """One line for each row."""
    heads = f"{'items/s':>9} {'(spread)':>17} {'÷ 1by1':>7} {'÷ limit':>7} {'÷ peer':>7} {'CPU µs':>9} {'same':>6}"
    print(f"  {'':24} {heads}")
    for name, row in table.items():
        print(f"  {name:24} {_line(row)}", flush=True)
    if own := table.get(WHOLE_SYSTEM):
        worker = own["cpu_us_per_item"]["worker"] - _cpu(table[LIMIT])
        print(f"  the system's own CPU time an item, beyond the limit's: {own['cpu_us_beyond_limit']:.0f} µs,", end=" ")
        print(f"of it the worker's {worker:.0f} µs", flush=True)


def _line(row: Row) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    ratios = " ".join(_ratio(row[key]) for key in ("ratio", "to_limit", "to_best_peer"))
    spread = f"({row['lowest']:.1f}-{row['highest']:.1f})"
    by_process = row["cpu_us_per_item"]
    parts = ", ".join(f"{name} {value:.0f}" for name, value in by_process.items()) if len(by_process) > 1 else ""
    wrong = "" if row["agreement"] >= ENOUGH else "  RESULTS DIFFER: this time does not count"
    numbers = f"{row['items_per_second']:9.1f} {spread:>17} {ratios} {_cpu(row):9.0f}"
    return f"{numbers} {row['agreement']:6.1%}  {parts}{wrong}"


def _ratio(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>7}"
