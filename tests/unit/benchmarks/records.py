"""Records as a benchmark writes them, small."""

from __future__ import annotations

from typing import Any

MACHINE: dict[str, Any] = {
    "cpu": "Test CPU", "cores": 2, "memory_gib": 8.0, "gpu": None, "python": "3.11.0",
    "versions": {"torch": "2.0"}, "settings": {"threads": 2},
}  # fmt: skip


def run(rate: float, *, items: int = 100, agreement: float = 1.0, cpu: float = 1.0, number: int = 1) -> dict[str, Any]:
    """One run of a contender, at `rate` items a second."""
    return {
        "round": number, "items": items, "seconds": items / rate, "items_per_second": rate, "agreement": agreement,
        "cpu": {"process": cpu}, "foreign_cores": 0.0,
    }  # fmt: skip


def load(*, number: int = 1, foreign: float = 0.0, stolen: float = 0.0) -> dict[str, Any]:
    """The load of one round."""
    return {
        "round": number, "load_before": 0.5, "load_after": 1.5, "seconds": 60.0, "cores": 2, "own_cores": 1.5,
        "foreign_cores": foreign, "stolen_cores": stolen,
    }  # fmt: skip


def record(
    contenders: dict[str, Any], *, usual: int = 100, rounds: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """A workload's record: runs by contender, or the reason (a string) why there are none."""
    rows = {name: {"missing": one} if isinstance(one, str) else {"runs": one} for name, one in contenders.items()}
    return {
        "stamp": {"date": "2026-01-02", "commit": "abc1234"},
        "facts": {"items": 100, "usual_items": dict.fromkeys(contenders, usual), "processes": 2},
        "contenders": rows,
        "rounds": [load()] if rounds is None else rounds,
    }


def entry(**sections: Any) -> dict[str, Any]:
    """What a machine's file holds."""
    return {"layout": 2, "machine": MACHINE, "sections": sections}
