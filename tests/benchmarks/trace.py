"""The trace of a worker: how busy its device was, and a picture of it. `python -m tests.benchmarks.trace --help`.

A worker writes one JSON line for each piece of work when `PIPEFLEET_WORKER_TRACE` names a file: stage, thread, start and end in
seconds of the monotonic clock, and the number of items.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

DEVICE_STAGE = "forward"
COLOURS = {
    "fetch": "#4e79a7",
    "decode": "#76b7b2",
    "preprocess": "#59a14f",
    "collate": "#edc948",
    "forward": "#e15759",
    "finish": "#b07aa1",
    "postprocess": "#f1ce63",
    "write": "#9c755f",
    "report": "#bab0ac",
}
OTHERS = ("#f28e2b", "#ff9da7", "#86bcb6", "#8cd17d")
_LANE, _LEFT, _WIDTH, _TOP = 18, 150, 1000, 46
_SMALLEST = 0.3
"""Pixels that the shortest piece of work is drawn with."""


@dataclass(frozen=True)
class Event:
    """One piece of work: `count` items in a stage, on a thread, from `start` to `end` in monotonic seconds."""

    stage: str
    thread: str
    start: float
    end: float
    count: int


def read(path: Path, *, since: float = 0.0) -> list[Event]:
    """The events of a trace file that start at `since` or later. A line that is cut off at the end is left out."""
    events = []
    for line in path.read_text().splitlines():
        try:
            event = Event(**json.loads(line))
        except ValueError:
            continue
        if event.start >= since:
            events.append(event)
    return events


def busy_share(events: Iterable[Event]) -> float:
    """The share of the time from the first forward's start to the last one's end in which a forward runs."""
    spans = sorted((event.start, event.end) for event in events if event.stage == DEVICE_STAGE)
    if not spans:
        return 0.0
    begin = reached = spans[0][0]
    busy = 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - begin)


def draw(events: Sequence[Event], title: str) -> str:
    """An SVG: a lane for each thread, a bar for each piece of work, coloured by stage. Raises ValueError without events."""
    if not events:
        raise ValueError("the trace holds no events in this span")
    begin, end = min(event.start for event in events), max(event.end for event in events)
    scale = _WIDTH / max(1e-9, end - begin)
    lanes = {thread: index for index, thread in enumerate(_threads(events))}
    colours = _colours(events)
    height = _TOP + _LANE * len(lanes) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="100%" height="100%" fill="white"/><text x="8" y="16" font-size="13">{escape(title)}</text>',
    ]
    parts += _legend(colours) + _axis(end - begin, height) + _lanes(lanes)
    for event in events:
        x, y = _LEFT + (event.start - begin) * scale, _TOP + _LANE * lanes[event.thread]
        width = max(_SMALLEST, (event.end - event.start) * scale)
        tip = f"{event.stage}, {event.count} items, {1e3 * (event.end - event.start):.1f} ms"
        parts.append(
            f'<rect x="{x:.2f}" y="{y + 2}" width="{width:.2f}" height="{_LANE - 4}" fill="{colours[event.stage]}">'
            f"<title>{escape(tip)}</title></rect>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _threads(events: Sequence[Event]) -> list[str]:
    """Threads in the order of the stages they work in, then by number."""
    ranks = {stage: rank for rank, stage in enumerate(COLOURS)}
    first: dict[str, int] = {}
    for event in events:
        rank = ranks.get(event.stage, len(ranks))
        first[event.thread] = min(rank, first.get(event.thread, rank))
    return sorted(first, key=lambda name: (first[name], [int(n) for n in re.findall(r"\d+", name)], name))


def _colours(events: Sequence[Event]) -> dict[str, str]:
    stages = {event.stage for event in events}
    unknown = sorted(stages - set(COLOURS))
    extra = {stage: OTHERS[index % len(OTHERS)] for index, stage in enumerate(unknown)}
    return {stage: colour for stage, colour in {**COLOURS, **extra}.items() if stage in stages}


def _legend(colours: dict[str, str]) -> list[str]:
    parts = []
    for index, (stage, colour) in enumerate(colours.items()):
        x = _LEFT + 110 * index
        parts.append(f'<rect x="{x}" y="24" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="33">{escape(stage)}</text>')
    return parts


def _axis(seconds: float, height: int) -> list[str]:
    parts = []
    for tenth in range(11):
        x = _LEFT + _WIDTH * tenth / 10
        parts.append(f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{height - 26}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x}" y="{height - 12}" text-anchor="middle">{seconds * tenth / 10:.2f} s</text>')
    return parts


def _lanes(lanes: dict[str, int]) -> list[str]:
    return [
        f'<text x="{_LEFT - 8}" y="{_TOP + _LANE * index + 13}" text-anchor="end">{escape(thread)}</text>'
        for thread, index in lanes.items()
    ]


def main() -> None:
    """Draw a span of a trace file."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.trace", description=__doc__)
    parser.add_argument("trace", type=Path, help="the file that PIPEFLEET_WORKER_TRACE named")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("--start", type=float, default=0.0, help="seconds after the first event (0)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="length of the span (to the end)")
    parser.add_argument("--title", default="One worker under load", help="the line above the picture")
    arguments = parser.parse_args()
    events = read(arguments.trace)
    begin = min((event.start for event in events), default=0.0) + arguments.start
    chosen = [event for event in events if begin <= event.start and event.end <= begin + arguments.seconds]
    share = busy_share(chosen)
    arguments.picture.write_text(draw(chosen, f"{arguments.title}: device busy {share:.1%}"))
    print(f"{len(chosen)} pieces of work, device busy {share:.1%}; drawn to {arguments.picture}")


if __name__ == "__main__":
    main()
