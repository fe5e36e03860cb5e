"""A snapshot as tables: for a terminal with rich, for other programs as plain text of whole lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipefleet_workers.watch.read import PoolRow, Snapshot, WorkerRow

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

POOL_COLUMNS = ("pool", "waits", "held", "backlog", "oldest", "workers", "items/s", "busy", "failed", "dead")
WORKER_COLUMNS = ("worker", "items/s", "busy", "items", "failed", "batches of", "a batch takes")
Cells = tuple[str, ...]


def pool_cells(row: PoolRow) -> Cells:
    """The columns of POOL_COLUMNS: messages that wait and that workers hold, the work in them, and so on."""
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
    """The columns of WORKER_COLUMNS."""
    batches = f"{row.max_cost} {'padded' if row.pads else 'of equal shape'}"
    takes = "not measured" if row.base is None else f"{seconds(row.base)} + {seconds(row.per_cost or 0.0)} a unit"
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
    scale, unit = (1.0, "s") if value >= 1 else (1e-3, "ms") if value >= 1e-3 else (1e-6, "µs")
    return f"{value / scale:.3g} {unit}"


def rate(value: float) -> str:
    """Items a second, three digits."""
    return "0" if value < 0.005 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def plain(snapshot: Snapshot) -> str:
    """Both tables as text without colours, one line for each row however wide."""
    pools = _aligned(POOL_COLUMNS, [pool_cells(one) for one in snapshot.pools])
    workers = _aligned(WORKER_COLUMNS, [worker_cells(one) for one in snapshot.workers])
    return f"{pools}\n\n{workers if snapshot.workers else 'no worker is alive'}"


def _aligned(names: Cells, rows: Sequence[Cells]) -> str:
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) if first else cell.rjust(width) for first, cell, width in _places(row, widths))
        for row in (names, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def _places(row: Cells, widths: Sequence[int]) -> list[tuple[bool, str, int]]:
    return [(place == 0, cell, width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))]


def screen(snapshot: Snapshot, *, trouble: str = "") -> Group:
    """Both tables for a terminal; `trouble` says why they are out of date."""
    from rich.console import Group
    from rich.text import Text

    age = time.time() - snapshot.read_at
    head = Text(f"pipefleet  {time.strftime('%H:%M:%S', time.localtime(snapshot.read_at))}", style="bold")
    if trouble:
        head.append(f"  STALE, {duration(age)} old: {trouble}", style="bold red")
    style = "dim" if trouble else ""
    pools = _table(POOL_COLUMNS, [(pool_cells(one), _pool_style(one)) for one in snapshot.pools], style)
    if not snapshot.workers:
        return Group(head, "", pools, "", Text("no worker is alive", style="yellow"))
    workers = _table(WORKER_COLUMNS, [(worker_cells(one), "") for one in snapshot.workers], style)
    return Group(head, "", pools, "", workers)


def _pool_style(row: PoolRow) -> str:
    starved = row.alive == 0 and sum(row.messages.values()) > 0
    return "red" if row.dead_letters else "yellow" if starved else ""


def _table(names: Cells, rows: Sequence[tuple[Cells, str]], style: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), style=style, header_style="bold cyan")
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place == 0 else "right", no_wrap=True, overflow="ellipsis")
    for cells, row_style in rows:
        table.add_row(*map(Text, cells), style=row_style)  # as they are: in plain strings rich takes [words] for markup
    return table
