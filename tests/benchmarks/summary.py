"""Figures of a workload's record: medians with spread, CPU time an item, shares of the limit. Pure functions over JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.agreement import ENOUGH
from tests.benchmarks.contenders import BATCHED, LIMITS, ONE_BY_ONE, PEERS, SYSTEM

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some runs."""

    median: float
    lowest: float
    highest: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises StatisticsError without values."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found))


@dataclass(frozen=True)
class Row:
    """What a contender reached. `items` is the smallest number that a run had; `few` is True when that is below the usual."""

    rate: Spread
    cpu_ms: Spread
    cpu_ms_by_process: dict[str, float]
    agreement: float
    items: int
    few: bool
    to_limit: float | None = None

    @property
    def counts(self) -> bool:
        """False when too many outputs differ from the pipeline's for the time to mean anything."""
        return self.agreement >= ENOUGH


def rows(record: Record) -> dict[str, Row]:
    """By contender, of those that have a run; in the record's order."""
    usual = record["facts"]["usual_items"]
    found = {
        name: _row(one["runs"], usual.get(name, 0)) for name, one in record["contenders"].items() if one.get("runs")
    }
    name = limit(found)
    if name is None:
        return found
    base = found[name].rate.median
    return {key: replace(row, to_limit=row.rate.median / base) for key, row in found.items()}


def limit(found: Mapping[str, Row]) -> str | None:
    """The best hand loop whose outputs agree; None when none was measured."""
    return _best(found, LIMITS)


def best_peer(found: Mapping[str, Row]) -> str | None:
    """The fastest foreign system whose outputs agree; None when none was measured."""
    return _best(found, PEERS)


def ratios(found: Mapping[str, Row]) -> dict[str, float]:
    """The whole system's rate divided by those of the limit, the pipeline in batches, the pipeline one by one, the best peer."""
    bases = {"limit": limit(found), "batched": BATCHED, "one-by-one": ONE_BY_ONE, "peer": best_peer(found)}
    if SYSTEM not in found or not found[SYSTEM].counts:
        return {}
    own = found[SYSTEM].rate.median
    return {
        key: own / found[name].rate.median
        for key, name in bases.items()
        if name in found and found[name].counts
    }  # fmt: skip


def beyond_limit_us(found: Mapping[str, Row]) -> tuple[float, float] | None:
    """Microseconds of CPU an item that the whole system takes beyond the limit, and the worker's part of them."""
    name = limit(found)
    if name is None or SYSTEM not in found:
        return None
    base, own = found[name].cpu_ms.median, found[SYSTEM]
    return 1e3 * (own.cpu_ms.median - base), 1e3 * (own.cpu_ms_by_process.get("worker", base) - base)


def _best(found: Mapping[str, Row], names: Iterable[str]) -> str | None:
    able = [name for name in names if name in found and found[name].counts]
    return max(able, key=lambda name: found[name].rate.median, default=None)


def _row(runs: list[Record], usual: int) -> Row:
    parts = {part for run in runs for part in run["cpu"]}
    items = min(run["items"] for run in runs)
    return Row(
        rate=Spread.of(run["items"] / run["seconds"] for run in runs),
        cpu_ms=Spread.of(1e3 * sum(run["cpu"].values()) / run["items"] for run in runs),
        cpu_ms_by_process={
            part: statistics.median(1e3 * run["cpu"].get(part, 0.0) / run["items"] for run in runs)
            for part in sorted(parts)
        },
        agreement=min(run["agreement"] for run in runs),
        items=items,
        few=items < usual,
    )
