"""The table that `pipefleet simulate` prints. `command` passes the rows of `run.compare`, and gets Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from pipefleet_workers.fleet.simulation.run import BOUND, Row


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table. Cost is paid time over work done; late is the share of the work that waited too long."""
    lines = [
        "| policy | devices | cost | late % (worst seed) | median wait s | p95 wait s | starts a day | price |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.policy} | {row.devices} | {row.cost:.3f} |"
        if row.policy == BOUND:
            lines.append(f"{start}  |  |  |  |  |")
            continue
        late = f"{100 * row.late:.2f} ({100 * row.worst_late:.2f})"
        waits = f"{row.median_wait:.0f} | {row.p95_wait:.0f} | {row.starts:.0f} | {row.price:.0f}"
        lines.append(f"{start} {late} | {waits} |")
    return "\n".join(lines)
