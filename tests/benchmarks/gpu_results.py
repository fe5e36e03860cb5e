"""Figures of `python -m tests.gpu` (its `results.json`) as an entry of the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.figures import LAYOUT
from tests.benchmarks.tables import number

SHARES = ("busy", "agreement", "same")
LEFT_OUT = ("note",)
NO_VERSION = ("row", "device", "cores", "Python")


def is_one(found: Mapping[str, Any]) -> bool:
    """True for the content of a `results.json`."""
    return isinstance(found.get("results"), list) and isinstance(found.get("machine"), dict)


def entry(found: Mapping[str, Any]) -> dict[str, Any]:
    """The machine, and a table for each check that has rows."""
    machine = found["machine"]
    versions = {name: text for name, text in machine.items() if name not in NO_VERSION}
    gpu = re.sub(r", [\d.]+ of ([\d.]+ GiB) free", r", \1", str(machine.get("device")))  # the same machine at every run
    return {
        "layout": LAYOUT,
        "machine": {
            "gpu": gpu, "cores": machine.get("cores"), "python": machine.get("Python"), "versions": versions,
        },
        "sections": {},
        "tables": [_table(one) for one in found["results"] if one.get("rows") and one.get("part") == "bench"],
    }  # fmt: skip


def _table(result: Mapping[str, Any]) -> dict[str, Any]:
    rows: Sequence[Mapping[str, Any]] = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in LEFT_OUT))
    notes = "\n".join(f"- {row.get('row')}: {row['note']}" for row in rows if row.get("note"))
    return {
        "title": result["name"],
        "text": notes,
        "head": [name.replace("_", " ") for name in names],
        "rows": [[_cell(name, row.get(name)) for name in names] for row in rows],
    }


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in SHARES and isinstance(value, int | float):
        return f"{value:.1%}"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")
