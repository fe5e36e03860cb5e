"""`pipefleet tasks` and `pipefleet queues`: what can be run, and what waits."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import Commands, command, print_json

if TYPE_CHECKING:
    from pipefleet.tasks import TaskSpec


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = command(
        commands, "tasks", tasks, help="list every task with its inputs and parameters", example="pipefleet tasks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser = command(
        commands, "queues", queues, help="show what waits in the queues of the fleet", example="pipefleet queues --json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def tasks(arguments: argparse.Namespace) -> int:
    """Print the task table."""
    rows = task_rows()
    if arguments.json:
        print_json(rows)
        return 0
    _table(("task", "input", "returns", "parameters"), [
        (row["name"], row["input"], row["returns"], ", ".join(row["parameters"])) for row in rows
    ])  # fmt: skip
    return 0


def task_rows() -> list[dict[str, Any]]:
    """The task table as JSON."""
    from pipefleet.tasks import TASKS

    return [
        {
            "name": spec.name,
            "aliases": list(spec.aliases),
            "input": _input(spec),
            "returns": spec.returns,
            "parameters": sorted(spec.parameters),
            "cost": str(spec.cost_unit),
        }
        for spec in TASKS.values()
    ]


def _input(spec: TaskSpec) -> str:
    fields = ", ".join(name if name in spec.required or not spec.required else f"{name}?" for name in spec.fields)
    return " or ".join(one for one in (str(spec.media or ""), f"{{{fields}}}" if fields else "") if one)


def queues(arguments: argparse.Namespace) -> int:
    """Print the depth of every pool's queue: waiting by priority, and with workers."""
    from pipefleet import broker
    from pipefleet.client import Client
    from pipefleet.fleet import model_label
    from pipefleet.routing import queue_name

    with Client() as client:
        rows = []
        for pool in client.fleet.pools.values():
            queue = queue_name(pool, client.fleet)
            with broker.redis_errors(client.settings.redis_url):
                depth = broker.depth(client.redis, queue)
            rows.append({"pool": pool.name, "queue": queue, "model": model_label(pool.model, pool.revision), **depth})
    if arguments.json:
        print_json(rows)
        return 0
    names = ("pool", "queue", "high", "normal", "low", "unacked", "model")
    _table(names, [tuple(str(row[name]) for name in names) for row in rows])
    return 0


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Aligned columns: folded to the width of a terminal, whole lines where another program reads them."""
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        for row in (names, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*names, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))  # as they are: in plain strings rich takes [words] for markup
    Console().print(table)
