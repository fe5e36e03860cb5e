"""The table of a run: lines on the terminal, `results.json`, and `results.md`, which the documentation can take over as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.plan import FAILED, PASSED, SKIPPED, Result

COLUMNS = {
    "row": "contender",
    "items": "items",
    "per_second": "items/s",
    "tokens_per_second": "tokens/s",
    "of_raw": "÷ raw loop",
    "busy": "device busy",
    "peak_gib": "peak GiB",
    "agreement": "same",
}
"""The fields of a row of the benchmark, in the order of the columns, and their heads."""
_SHARES = ("busy", "agreement")


def line(result: Result) -> str:
    """One line of the terminal."""
    return f"{result.state:8}{result.seconds:7.1f} s  {result.name}: {result.said}"


def summary(results: Sequence[Result], seconds: float) -> str:
    """The last line."""
    counts = {state: sum(one.state == state for one in results) for state in (PASSED, FAILED, SKIPPED)}
    return ", ".join(f"{count} {state}" for state, count in counts.items()) + f" in {seconds:.0f} s"


def write(folder: Path, machine: dict[str, Any], results: Sequence[Result], seconds: float) -> None:
    """Write both files."""
    content = {"machine": machine, "seconds": round(seconds, 1), "results": [one.to_json() for one in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "results.md").write_text(markdown(machine, results, seconds))


def markdown(machine: dict[str, Any], results: Sequence[Result], seconds: float) -> str:
    """The whole report as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "row")
    lines = [f"Measured on {facts}. {summary(results, seconds)}.", ""]
    lines += _table(["check", "result", "s", "shown"], [_cells(one) for one in results])
    for one in results:
        if one.part == "bench" and one.rows:
            lines += ["", f"**{one.name}**", "", *figures(one.rows)]
    return "\n".join(lines) + "\n"


def figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of one benchmark as a Markdown table, with the columns that some row has."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    table = _table([COLUMNS[name] for name in names], [[_cell(name, row.get(name)) for name in names] for row in rows])
    notes = [f"- {row['row']}: {row['note']}" for row in rows if row.get("note")]
    return [*table, *(["", *notes] if notes else [])]


def _cells(result: Result) -> list[str]:
    return [result.name, result.state, f"{result.seconds:.1f}", result.said]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *safe)]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in _SHARES:
        return f"{value:.1%}"
    if name == "of_raw":
        return f"{value:.2f}"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
