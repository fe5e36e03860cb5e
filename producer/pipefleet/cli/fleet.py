"""`pipefleet tasks`, `queues` and `dead-letters`: the task table, the messages that wait, and those that no worker will run."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import Commands, add_json_option, command, print_error, print_json, print_line, print_troubles
from pipefleet.connection.rights import require
from pipefleet.connection.wrong_type import passed_over
from pipefleet.errors import UsageError
from pipefleet.printable import printable

if TYPE_CHECKING:
    from pipefleet.client import Client
    from pipefleet.fleet.pools import Pool
    from pipefleet.queues.dead_letters import DeadLetter
    from pipefleet.tasks import TaskSpec

MOST_CELL = 400
"""Characters of one cell of a table."""
MOST_LETTERS = 10_000
"""Dead letters of one queue that are queued again or removed in one step."""


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = command(
        commands, "tasks", tasks, help="list every task with its inputs and parameters", example="pipefleet tasks"
    )
    add_json_option(parser, "print one JSON list")
    parser = command(
        commands, "queues", queues, help="show what waits in the queues of the fleet", example="pipefleet queues --json"
    )
    add_json_option(parser, "print one JSON list")
    parser = command(
        commands, "dead-letters", dead_letters, help="list messages that were given up, queue them again or remove them",
        example="pipefleet dead-letters --requeue",
    )  # fmt: skip
    parser.add_argument("--pool", help="only those of this pool")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--requeue", action="store_true", help="queue them once more, their deliveries counted anew")
    what.add_argument("--remove", action="store_true", help="throw them away")
    parser.add_argument(
        "--id", action="extend", nargs="+", default=[], metavar="JOB", dest="ids", help="only those of these jobs"
    )
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="list the newest N of each pool at most (default: 100)"
    )
    add_json_option(parser, "print one JSON list, inputs up to 10,000 characters")


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
        }
        for spec in TASKS.values()
    ]


def _input(spec: TaskSpec) -> str:
    fields = ", ".join(name if name in spec.required or not spec.required else f"{name}?" for name in spec.fields)
    return " or ".join(one for one in (str(spec.media or ""), f"{{{fields}}}" if fields else "") if one)


def queues(arguments: argparse.Namespace) -> int:
    """Print for every pool and revision its messages (waiting, with workers, delayed, dead) and its workers.

    Exit code 3 if a pool cannot be read; the others are printed.
    """
    from pipefleet.client import Client
    from pipefleet.connection.errors import redis_errors

    with Client() as client, redis_errors(client.settings.redis_url):
        rows, troubles = _backlog_rows(client)
    if arguments.json:
        print_json(rows)
        return print_troubles(troubles)
    names = ("pool", "queue", "high", "normal", "low", "unacked", "delayed", "dead", "workers", "model")
    _table(names, [tuple(str(row[name]) for name in names) for row in rows])
    for row in rows:
        if row["note"]:
            print_line(f"{row['pool']}: {row['note']}")
    return print_troubles(troubles)


def _backlog_rows(client: Client) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and the reasons why some pools cannot be read."""
    from pipefleet.fleet.pools import model_label
    from pipefleet.fleet.revisions import read_backlogs
    from pipefleet.fleet.routing import queue_name
    from pipefleet.queues import dead_letters as deadletters

    rows, troubles = [], dict[str, str]()
    for one in read_backlogs(client.redis, client.fleet, troubles=troubles):
        part, pool = one.part, one.part.pool
        own = pool.generation > 0
        row: dict[str, Any] = {"pool": part.key, "queue": part.queue if own else queue_name(pool, client.fleet)}
        row |= {"model": model_label(pool.model, pool.revision), **one.waiting}
        row |= {"unacked": one.held.leased, "delayed": one.held.delayed}
        with passed_over(troubles, part.key):
            row |= {"dead": 0 if own else deadletters.count_dead_letters(client.redis, part.queue)}
            rows.append({**row, "workers": one.workers, "note": one.note})
    return rows, list(troubles.values())


def dead_letters(arguments: argparse.Namespace) -> int:
    """Print, queue again or remove dead letters. Exit code 1 if one could not be queued again."""
    from pipefleet.client import Client

    with Client() as client:
        found = _chosen(client, arguments)
        rows = [
            _letter_row(pool, letter, _deal_with(client, letter, queue, arguments)) for pool, queue, letter in found
        ]
    if arguments.json:
        print_json(rows)
    else:
        _table(_LETTER_COLUMNS, [_letter_cells(row) for row in rows])
    return int(any(row["became"].startswith("cannot") for row in rows))


_LETTER_COLUMNS = ("pool", "job", "task", "item", "input", "run", "shard", "deliveries", "reason", "became")


def _chosen(client: Client, arguments: argparse.Namespace) -> list[tuple[str, str, DeadLetter]]:
    """Pool, queue and letter of every chosen dead letter. Raises UsageError for an id that no letter has."""
    from pipefleet.connection.errors import redis_errors
    from pipefleet.queues import dead_letters as deadletters

    changes, ids = arguments.requeue or arguments.remove, set(arguments.ids)
    most = sys.maxsize if ids else MOST_LETTERS if changes else max(0, arguments.limit)
    found = []
    for pool, queue in _queues(client, only=arguments.pool):
        with redis_errors(client.settings.redis_url):
            require(client.redis, "dead-letters", "operator", *deadletters.rights(queue, changes=changes))
            count = deadletters.count_dead_letters(client.redis, queue)
            letters = islice(deadletters.every_dead_letter(client.redis, queue), most)
            found += [(pool.name, queue, letter) for letter in letters if not ids or letter.job_id in ids]
        if count > most:
            verb = "dealt with; call again for the others" if changes else "shown; see --limit"
            print_error(f"pool {pool.name}: {count} dead letters, the newest {most} are {verb}")
    unknown = ids.difference(letter.job_id for *_, letter in found)
    if unknown:
        names = ", ".join(printable(one) for one in sorted(unknown))
        raise UsageError(f"no dead letter is of the job {names}; see `pipefleet dead-letters`")
    return found


def _deal_with(client: Client, letter: DeadLetter, queue: str, arguments: argparse.Namespace) -> str:
    from pipefleet.connection.errors import redis_errors
    from pipefleet.queues import dead_letters as deadletters
    from pipefleet.runs.letters import requeue

    if arguments.requeue:
        return requeue(client, letter, queue)
    if not arguments.remove:
        return "kept"
    with redis_errors(client.settings.redis_url):
        return "removed" if deadletters.remove_dead_letter(client.redis, letter, queue) else "gone"


def _letter_row(pool: str, letter: DeadLetter, became: str) -> dict[str, Any]:
    """A letter as `--json` prints it. `result` is the URI for the result of a requeued job, beside its record."""
    from pipefleet.runs.letters import read_content

    content = read_content(letter)
    shard = content.shard
    return {
        "pool": pool,
        "queue": letter.queue,
        "job": letter.job_id,
        "reason": letter.reason,
        "at": letter.at,
        "deliveries": letter.deliveries,
        "task": content.task,
        "item": content.item,
        "input": content.input,
        "run": shard and shard.run_uri,
        "shard": shard and shard.index,
        "result": content.output,
        "became": became,
    }


def _letter_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table. The fields of a message may hold anything, so all are escaped for the terminal."""
    became = row["became"]
    if became == "queued again" and row["result"]:
        became += f"; the result goes to {row['result']}"
    cells = {**row, "became": became}
    bounds = {"became": 400, "reason": 400, "run": 200, "job": 200}
    return tuple(
        printable("" if cells[name] is None else str(cells[name]), bounds.get(name, 80)) for name in _LETTER_COLUMNS
    )


def _queues(client: Client, *, only: str | None = None) -> list[tuple[Pool, str]]:
    """Every pool with its queue. Raises UsageError for an unknown pool."""
    from pipefleet.fleet.routing import queue_name

    pools = client.fleet.pools
    if only is not None and only not in pools:
        raise UsageError(f"there is no pool {only[:60]!r}; the fleet has {', '.join(pools)}")
    return [(pool, queue_name(pool, client.fleet)) for pool in pools.values() if only in (None, pool.name)]


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print aligned columns: folded to the width of a terminal, in whole lines for another program."""
    rows = [tuple(printable(cell, MOST_CELL) for cell in row) for row in rows]
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
        table.add_row(*map(Text, row))  # Text, because rich reads [words] in plain strings as markup
    Console().print(table)
