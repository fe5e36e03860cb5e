"""Markdown of one section each, from its record. Pure functions; `report` puts them together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.benchmarks import load, summary
from tests.benchmarks.contenders import CELERY, SYSTEM, TITLES
from tests.benchmarks.summary import Record, Row, Spread
from tests.benchmarks.workloads import WORKLOADS

MARK = "\\*"
"""Stands at a figure that comes from fewer items than usual."""
RATIOS = {
    "limit": "whole system ÷ the limit",
    "batched": "whole system ÷ `pipeline(batch_size=32)`",
    "one-by-one": "whole system ÷ `pipeline()` one by one",
    "peer": "whole system ÷ the best peer",
}
Sections = Mapping[str, Record]


def workloads(sections: Sections) -> str:
    """Items a second of every contender, ratios of medians, CPU time an item, and notes."""
    chosen = {name: one for name, one in sections.items() if name in WORKLOADS}
    found = {name: summary.rows(one) for name, one in chosen.items()}
    parts = [_rates(chosen, found), _cpu(found), _notes(chosen, found)]
    return "\n\n".join(part for part in parts if part)


def _rates(chosen: Sections, found: Mapping[str, Mapping[str, Row]]) -> str:
    lines = [
        [TITLES[name], *(_rate(name, chosen[column], found[column]) for column in chosen)]
        for name in TITLES
        if any(name in one["contenders"] for one in chosen.values())
    ]
    ratios = {column: summary.ratios(found[column]) for column in chosen}
    lines += [
        [title, *(number(ratios[column][key]) if key in ratios[column] else "-" for column in chosen)]
        for key, title in RATIOS.items()
        if any(key in one for one in ratios.values())
    ]
    return table(["items/s", *chosen], lines)


def _rate(name: str, record: Record, found: Mapping[str, Row]) -> str:
    """A cell: the median, its spread, the mark; the limit in bold."""
    if name not in found:
        one = record["contenders"].get(name, {})
        if one.get("missing", "").startswith("not installed"):
            return "not installed"
        return "failed" if one.get("failures") else "-"
    row = found[name]
    if not row.counts:
        return f"does not count: {row.agreement:.0%} agree"
    cell = spread(row.rate) + MARK * row.few
    return f"**{cell}**" if name == summary.limit(found) else cell


def _cpu(found: Mapping[str, Mapping[str, Row]]) -> str:
    names = [name for name in TITLES if any(name in rows for rows in found.values())]
    lines = [[TITLES[name], *(_cpu_cell(rows.get(name)) for rows in found.values())] for name in names]
    beyond = {column: summary.beyond_limit_us(rows) for column, rows in found.items()}
    if any(beyond.values()):
        cells = [f"{number(one[0] / 1e3)} ({number(one[1] / 1e3)})" if one else "-" for one in beyond.values()]
        lines.append(["whole system beyond the limit (of it the worker)", *cells])
    return table(["CPU ms an item", *found], lines)


def _cpu_cell(row: Row | None) -> str:
    return "-" if row is None or not row.counts else number(row.cpu_ms.median) + MARK * row.few


def _notes(chosen: Sections, found: Mapping[str, Mapping[str, Row]]) -> str:
    """What a reader has to know of the figures above: few items, differing outputs, failures, missing contenders, foreign load."""
    lines = [line for column, rows in found.items() for line in _few_items(column, chosen[column], rows)]
    lines += [
        f"{TITLES[name]}, `{column}`: {row.agreement:.1%} of the outputs agree."
        for column, rows in found.items()
        for name, row in rows.items()
        if row.agreement < 1.0
    ]
    every = [(column, name, one) for column in chosen for name, one in chosen[column]["contenders"].items()]
    lines += [
        f"{TITLES[name]}, `{column}`: failed in round {failure['round']}."
        for column, name, one in every
        for failure in one.get("failures", ())
    ]
    lines += sorted({f"{TITLES[name]}: {one['missing']}." for _, name, one in every if "missing" in one})
    lines += [sentence for column in chosen for sentence in load.warnings(column, chosen[column].get("rounds", ()))]
    return "\n".join(f"- {line}" for line in lines)


def _few_items(column: str, record: Record, rows: Mapping[str, Row]) -> list[str]:
    """A line for each pair of counts: what a figure comes from, and what it usually comes from."""
    usual = record["facts"]["usual_items"]
    groups: dict[tuple[int, int], list[str]] = {}
    for name, row in rows.items():
        if row.few:
            groups.setdefault((row.items, usual[name]), []).append(TITLES[name])
    return [
        f"{MARK} `{column}` with {items:,} items instead of {wanted:,}: "
        f"{'all' if len(names) == len(rows) else ', '.join(names)}."
        for (items, wanted), names in groups.items()
    ]


def single(record: Record) -> str:
    """Throughput and latency of single jobs."""
    names = {SYSTEM: "pipefleet", CELERY: TITLES[CELERY]}
    lines = []
    for name, title in names.items():
        runs = record["contenders"].get(name, {}).get("runs")
        if runs:
            keys = ("jobs_per_second", "latency_p50_ms", "latency_p99_ms")
            cells = [spread(Spread.of(run[key] for run in runs)) for key in keys]
            used = Spread.of(sum(run["cpu_us_per_job"].values()) / 1e3 for run in runs)
            worker = statistics.median(run["cpu_us_per_job"]["worker"] / 1e3 for run in runs)
            lines.append([title + few(record), *cells, spread(used), number(worker)])
    head = ["", "jobs/s, 64 in flight", "p50 ms, one in flight", "p99 ms", "CPU ms a job", "of it the worker's"]
    return table(head, lines) + _after("single", record)


def growth(record: Record) -> str:
    """Memory of a worker."""
    run = _last(record, "worker")
    return (
        f"A worker over a bulk run of {run['items']:,} trivial items{few(record)} has {run['first_mib']:.0f} MiB in the first "
        f"tenth of the run, {run['middle_mib']:.0f} in the middle, {run['last_mib']:.0f} in the last tenth, and "
        f"{run['peak_mib']:.0f} at its peak." + _after("worker-memory", record)
    )


def simulated(record: Record) -> str:
    """The device's busy share."""
    run = _last(record, "device")
    base, per_element = record["facts"]["service"].split(",")
    return (
        f"A simulated accelerator ({1e3 * float(base):g} ms a batch and {per_element} s for each element of a picture's tensor, "
        f"Python's lock released) fed with {run['items']:,} JPEGs from S3{few(record)} was busy {run['busy_share']:.1%} of the "
        f"time from its first forward to its last, at {number(run['items_per_second'])} pictures a second. "
        "[The trace](trace.svg) shows the stages." + _after("simulated", record)
    )


def memory(record: Record) -> str:
    """Memory of a producer."""
    runs = [one["runs"][-1] for one in record["contenders"].values() if one.get("runs")]
    parts = [f"over {run['objects']:,} at {run['peak_mib']:.1f} MiB ({number(run['seconds'])} s)" for run in runs]
    return f"Planning a run over listed objects peaks {', '.join(parts)}{few(record)}." + _after("memory", record)


def start(record: Record) -> str:
    """Seconds to a ready fleet."""
    runs = record["contenders"]["stack"]["runs"]
    return (
        "The embedded stack with Whisper tiny.en, MiniLM, both workers warmed up and Flower is ready after "
        f"{spread(Spread.of(run['seconds'] for run in runs))} s." + _after("start", record)
    )


OTHERS: dict[str, tuple[str, Callable[[Record], str]]] = {
    "simulated": ("One device, kept busy", simulated),
    "single": ("Single jobs", single),
    "memory": ("Memory of a producer", memory),
    "worker-memory": ("Memory of a worker", growth),
    "start": ("Start", start),
}
"""Sections that are no workload: heading and Markdown."""


def runs(sections: Sections) -> str:
    """When and how quietly each section was measured."""
    lines = []
    for name, record in sections.items():
        loads = record.get("rounds", ())
        if loads:
            minutes = sum(one["seconds"] for one in loads) / 60
            averages = [one[key] for one in loads for key in ("load_before", "load_after")]
            others = max(one["foreign_cores"] + one["stolen_cores"] for one in loads)
            stamp = record["stamp"]
            lines.append(
                [f"`{name}`", stamp["date"], stamp["commit"] or "-", str(max(one["round"] for one in loads)),
                 number(minutes), f"{min(averages):.2f}-{max(averages):.2f}", f"{others:.2f}"]
            )  # fmt: skip
    return table(["section", "date", "commit", "rounds", "minutes", "load average", "cores used by others"], lines)


def few(record: Record) -> str:
    """The mark and what it means, or nothing."""
    facts = record["facts"]
    items, usual = facts.get("items", 0), facts.get("usual", 0)
    return f" ({MARK} usually {usual:,})" if items < usual else ""


def spread(found: Spread) -> str:
    """The median, and where there are several runs the lowest and highest in brackets."""
    if found.runs == 1:
        return number(found.median)
    return f"{number(found.median)} ({number(found.lowest)}-{number(found.highest)})"


def number(value: float) -> str:
    """About three significant digits."""
    for least, digits in ((99.95, 0), (9.995, 1), (0.0995, 2)):
        if abs(value) >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _last(record: Record, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = record["contenders"][name]["runs"][-1]
    return found


def _after(section: str, record: Record) -> str:
    """Warnings that follow a section's own text."""
    return "".join(f"\n\n{sentence}" for sentence in load.warnings(section, record.get("rounds", ())))
