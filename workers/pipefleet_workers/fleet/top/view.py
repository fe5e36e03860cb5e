"""A snapshot as tables: for a terminal with rich, for other programs as plain text of whole lines.

`command` passes a `Snapshot` to `plain` or `screen` and prints the result. No I/O, and no errors of its own: names and texts from
Redis are made printable here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipefleet.printable import printable
from pipefleet_workers.fleet.top.read import PoolRow, Snapshot, WorkerRow

if TYPE_CHECKING:
    from rich.console import Group

POOL_COLUMNS = ("pool", "waits", "held", "backlog", "oldest", "workers", "items/s", "busy", "failed", "dead")
WORKER_COLUMNS = ("worker", "items/s", "busy", "items", "failed", "batch budget", "batch takes")
NOBODY = "no worker is alive"
SHORTEST = 12
"""Least characters of a name."""
MOST_CELL = 200
"""Most characters of a cell."""
Cells = tuple[str, ...]


def pool_cells(row: PoolRow) -> Cells:
    """The cells of a pool's row, in the order of POOL_COLUMNS. Delayed messages count as waiting."""
    waits = row.messages["queued"] + row.messages["delayed"]
    return (
        row.pool,
        str(waits),
        str(row.messages["leased"]),
        "?" if row.backlog_seconds is None else duration(row.backlog_seconds),
        duration(row.oldest_age_seconds) if waits else "-",
        f"{row.alive}/{'-' if row.wanted is None else row.wanted}",
        rate(row.items_per_second),
        "-" if row.busy is None else f"{row.busy:.0%}",
        str(row.failed),
        str(row.dead_letters),
    )


def worker_cells(row: WorkerRow) -> Cells:
    """The cells of a worker's row, in the order of WORKER_COLUMNS. `batch takes` is the fitted time: base + seconds per unit."""
    batches = f"{row.max_cost} {'padded' if row.pads else 'equal'}"
    takes = "?" if row.base is None else f"{seconds(row.base)}+{seconds(row.per_cost or 0.0)}/unit"
    return (row.worker, rate(row.items_per_second), f"{row.busy:.0%}", str(row.items), str(row.failed), batches, takes)


def duration(value: float) -> str:
    """Seconds for people: `0 s`, `45 s`, `12 min`, `3.5 h`, `2.1 d`."""
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 172_800 else f"{value / 86_400:.1f} d"


def seconds(value: float) -> str:
    """A short time with its unit: `2.1 ms`, `340 µs`."""
    if not value:
        return "0"
    scale, unit = (1.0, "s") if value >= 1 else (1e-3, "ms") if value >= 1e-3 else (1e-6, "µs")
    return f"{value / scale:.3g} {unit}"


def rate(value: float) -> str:
    """Items a second, three digits."""
    return "0" if value < 0.005 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def plain(snapshot: Snapshot) -> str:
    """Both tables as text without colours, one line for each row, however wide."""
    pools = lines(POOL_COLUMNS, [pool_cells(one) for one in snapshot.pools])
    workers = lines(WORKER_COLUMNS, [worker_cells(one) for one in snapshot.workers])
    return "\n".join([*pools, *notes(snapshot), "", *(workers if snapshot.workers else [NOBODY])])


def notes(snapshot: Snapshot) -> list[str]:
    """A line for each pool and each worker with a note."""
    pools = [f"{one.pool}: {one.note}" for one in snapshot.pools if one.note]
    barred = [f"{one.worker} takes no jobs: {one.barred}" for one in snapshot.workers if one.barred]
    refused = [
        f"{one.worker} gives jobs back whose bucket S3 refuses to it: {', '.join(f's3://{name}/' for name in one.refused)}"
        for one in snapshot.workers
        if one.refused
    ]
    return [printable(line, 1000) for line in [*pools, *barred, *refused]]


def lines(names: Cells, rows: Sequence[Cells], width: int | None = None) -> list[str]:
    """The head and the rows in aligned columns; if `width` is too small for all, the first column is shortened."""
    rows = [tuple(printable(cell, MOST_CELL) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    gap = 2 if width is None or sum(widths) + 2 * len(widths) <= width else 1
    if width is not None:
        rest = sum(widths[1:]) + gap * (len(widths) - 1)
        widths[0] = max(SHORTEST, min(widths[0], width - rest))
    found = []
    for first, *others in (names, *rows):
        cells = [shortened(first, widths[0]).ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        found.append((" " * gap).join(cells).rstrip())
    return found


def shortened(text: str, room: int) -> str:
    """`text` in `room` characters. Its middle is cut, since names begin with the pool and end with the process."""
    if len(text) <= room:
        return text
    end = (room - 1) // 2 + 2
    return f"{text[: room - 1 - end]}…{text[-end:]}"


def screen(snapshot: Snapshot, *, width: int, trouble: str = "", age: float = 0.0) -> Group:
    """Both tables for a terminal of this width; `trouble` gives the reason if they are `age` seconds old."""
    from rich.console import Group
    from rich.text import Text

    head = [Text(f"pipefleet  {time.strftime('%H:%M:%S', time.localtime(snapshot.read_at))}", style="bold")]
    if trouble:
        head.append(Text(f"STALE, {duration(age)} old: {printable(trouble, 1000)}", style="bold red"))
    pools = lines(POOL_COLUMNS, [pool_cells(one) for one in snapshot.pools], width)
    workers = lines(WORKER_COLUMNS, [worker_cells(one) for one in snapshot.workers], width)
    dim = "dim" if trouble else ""
    body = [Text(pools[0], style="bold cyan")]
    body += [Text(line, style=_style(row) or dim) for line, row in zip(pools[1:], snapshot.pools, strict=True)]
    body += [Text(line, style=dim or "yellow") for line in notes(snapshot)]
    body += [Text(printable(line, 1000), style=dim or "red") for line in snapshot.troubles.values()]
    body.append(Text(""))
    if snapshot.workers:
        body += [Text(workers[0], style="bold cyan"), *(Text(line, style=dim) for line in workers[1:])]
    else:
        body.append(Text(NOBODY, style="yellow"))
    for line in body:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(*head, Text(""), *body)


def _style(row: PoolRow) -> str:
    starved = row.alive == 0 and sum(row.messages.values()) > 0
    return "red" if row.dead_letters else "yellow" if starved else ""
