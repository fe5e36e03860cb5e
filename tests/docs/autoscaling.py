"""The tables and the picture of docs/autoscaling.md, from simulations: `python -m tests.docs.autoscaling` writes them anew.

The prose of the document is written by hand; only the text between its marks is generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipefleet_workers.fleet.simulation.knowledge import Knowledge
from pipefleet_workers.fleet.simulation.report import table
from pipefleet_workers.fleet.simulation.run import BOUND, POLICIES, Row, Scenario, compare, run_pool
from pipefleet_workers.fleet.simulation.traffic import Traffic
from pipefleet_workers.fleet.simulation.workers import Hardware

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "autoscaling.md"
PICTURE = DOCUMENT.with_name("autoscaling-day.svg")
SIZES = (1, 10, 100, 1000, 10_000)
SEEDS = (1, 2, 3)
OURS = "pipefleet through KEDA"
PICTURED = ("pipefleet", "KEDA, list length 20", "backlog per instance, tuned")
_MARK = "<!-- generated: {} -->"
_END = "<!-- end -->"


def filled(text: str) -> str:
    """The text of the document with its marked parts made anew, which takes a minute. Raises ValueError where a mark is missing."""
    for name, make in PARTS.items():
        mark = _MARK.format(name)
        found = re.search(f"{re.escape(mark)}\n.*?{re.escape(_END)}", text, re.DOTALL)
        if not found:
            raise ValueError(f"the document lacks the mark {mark!r} and a {_END!r} behind it")
        before, after = text[: found.start()], text[found.end() :]
        text = f"{before}{mark}\n{make()}\n{_END}{after}"
    return text


def size_table() -> str:
    """Cost and lateness of every policy by size of the fleet."""
    rows = [row for size in SIZES for row in compare(Scenario(Traffic(size)), list(POLICIES), SEEDS)]
    lines = ["| policy | " + " | ".join(f"{size:,}" for size in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for name in [*POLICIES, BOUND]:
        lines.append(f"| {name} | " + " | ".join(_cell(row) for row in rows if row.policy == name) + " |")
    return "\n".join(lines)


def wait_table() -> str:
    """Everything else of the fleet of a hundred."""
    return table(compare(Scenario(Traffic(100)), list(POLICIES), SEEDS))


def trouble_table() -> str:
    """Ours and the tuned rival when something is not as planned."""
    names = [OURS, "backlog per instance, tuned"]
    lines = ["| what differs | " + " | ".join(names) + " | bound |", "|---|---|---|---|"]
    for what, scenario in _troubles().items():
        lines.append(f"| {what} | " + " | ".join(_cell(row) for row in compare(scenario, names, SEEDS)) + " |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {"sizes": size_table, "waits": wait_table, "troubles": trouble_table}


def _cell(row: Row) -> str:
    return f"{row.cost:.3f}" if row.policy == BOUND else f"{row.cost:.2f} · {100 * row.late:.2f}"


def _troubles() -> dict[str, Scenario]:
    usual = Scenario(Traffic(100))
    traffic, hardware = usual.traffic, usual.hardware

    def with_traffic(**changes: Any) -> Scenario:
        return replace(usual, traffic=replace(traffic, **changes))

    def with_hardware(**changes: Any) -> Scenario:
        return replace(usual, hardware=replace(hardware, **changes))

    return {
        "nothing": usual,
        "jobs four times as large for 15 % of the day": with_traffic(jump=4.0),
        "the same, and jobs are only counted": replace(with_traffic(jump=4.0), knowledge=Knowledge(counted=True)),
        "12 bursts a day": with_traffic(bursts=12),
        "bursts twice as large": with_traffic(burst_seconds=480.0),
        "heavy tail (sigma 1.5)": with_traffic(spread=1.5),
        "load three times as noisy": with_traffic(drift=0.15),
        "office hours, up within 10 minutes": with_traffic(ramp=600.0),
        "30 % spot losses an hour, half without notice": with_hardware(spot_loss=0.3, hard=0.5),
        "lost work comes back after an hour": with_hardware(redelivery=3600.0),
        "cold starts of 5 to 9 minutes": with_hardware(cold_start=(300.0, 540.0)),
        "cost of waiting work three times as uncertain": replace(usual, knowledge=Knowledge(noise=0.5)),
        "five pools": replace(usual, pools=5),
        "a third of the workers on demand": replace(usual, hardware=Hardware(on_demand=1 / 3)),
    }


_LEFT, _WIDTH, _PANEL, _GAP = 60, 900, 110, 34
_COLOURS = {"load": "#bab0ac", "workers": "#4e79a7", "oldest": "#e15759"}


def day_picture() -> str:
    """An SVG of one day of a hundred devices: for each pictured policy the load, the workers that are paid, the oldest job."""
    scenario = Scenario(Traffic(100))
    panels = [(name, run_pool(scenario, scenario.traffic, name, SEEDS[0]).trace) for name in PICTURED]
    top = max(float(trace[:, 1].max()) for _, trace in panels)
    height = 40 + len(panels) * (_PANEL + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        *_legend(),
    ]
    for index, (name, trace) in enumerate(panels):
        parts += _panel(name, trace, top=top, slo=scenario.slo, y=46 + index * (_PANEL + _GAP))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    words = {"load": "load", "workers": "workers paid", "oldest": "oldest job (dashed line: 600 s)"}
    parts = []
    for index, (name, word) in enumerate(words.items()):
        x = _LEFT + 130 * index
        parts.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{_COLOURS[name]}"/>')
        parts.append(f'<text x="{x + 14}" y="19">{word}</text>')
    return parts


def _panel(name: str, trace: Any, *, top: float, slo: float, y: int) -> list[str]:
    load, workers, oldest = (trace[:, column] for column in range(3))
    highest = max(2 * slo, 1.0)
    limit = y + _PANEL - _PANEL * slo / highest
    return [
        f'<text x="{_LEFT}" y="{y - 6}" font-size="12">{name}</text>',
        f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_PANEL}" fill="none" stroke="#dddddd"/>',
        f'<text x="{_LEFT - 6}" y="{y + 10}" text-anchor="end">{top:.0f}</text>',
        f'<text x="{_LEFT - 6}" y="{y + _PANEL}" text-anchor="end">0</text>',
        f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="{_COLOURS["oldest"]}" '
        'stroke-dasharray="4 4" stroke-width="0.6"/>',
        _line(load, top, y, "load"),
        _line(oldest, highest, y, "oldest"),
        _line(workers, top, y, "workers"),
    ]


def _line(values: Sequence[float], top: float, y: int, colour: str) -> str:
    scale = _WIDTH / max(1, len(values) - 1)
    points = " ".join(
        f"{_LEFT + index * scale:.1f},{y + _PANEL * (1 - min(1.0, value / top)):.1f}"
        for index, value in enumerate(values)
    )
    return f'<polyline points="{points}" fill="none" stroke="{_COLOURS[colour]}" stroke-width="1.2"/>'


if __name__ == "__main__":
    DOCUMENT.write_text(filled(DOCUMENT.read_text()))
    PICTURE.write_text(day_picture())
