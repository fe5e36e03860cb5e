"""The command `pipefleet top`: one table, or a screen that is redrawn every second.

`cli` registers it. With `--once` or `--json`, or if stdout is no terminal, it prints one reading and ends, with code 3 if a pool
cannot be read. If Redis is away at the start, it raises ServiceUnavailableError; later the screen is marked as stale.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import TYPE_CHECKING

from pipefleet.cli.common import Commands, add_json_option, command, print_json, print_troubles
from pipefleet.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from pipefleet.client import Client

REFRESH_SECONDS = 1.0
PATIENCE = 2.0
"""Seconds to wait for one answer of Redis: a screen that hangs is worse than a screen that says it is out of date."""


def register(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands, "top", top,
        help="watch the fleet: what waits, who works, how fast, what failed",
        example="pipefleet top --once",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print one plain table and end (so it is when piped, too)")
    add_json_option(parser, "print one JSON document and end")


def top(arguments: argparse.Namespace) -> int:
    """Show the fleet once, or again and again until Ctrl-C. Returns 3 if a pool cannot be read.

    Raises ServiceUnavailableError when Redis is away at the start.
    """
    from pipefleet.client import Client
    from pipefleet.settings import load_settings
    from pipefleet_workers.fleet.top.read import read_fleet
    from pipefleet_workers.fleet.top.view import plain

    settings = load_settings()
    quick = settings.model_copy(update={"redis_timeout": min(settings.redis_timeout, PATIENCE)})
    with Client(quick) as client:
        if not (arguments.json or arguments.once) and sys.stdout.isatty():
            watch(client)
            return 0
        snapshot = read_fleet(client)
    if arguments.json:
        print_json(snapshot.to_json())
    else:
        print(plain(snapshot))
    return print_troubles(snapshot.troubles.values())


def watch(client: Client) -> None:
    """Redraw the screen every second until Ctrl-C; while Redis is away, the last numbers stay, marked as stale."""
    from rich.live import Live

    from pipefleet_workers.fleet.top.read import read_fleet
    from pipefleet_workers.fleet.top.view import screen

    snapshot, read = read_fleet(client), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), Live(screen=True, auto_refresh=False) as live:
        while True:
            begin = time.monotonic()
            trouble = ""
            try:
                snapshot, read = read_fleet(client), time.monotonic()
            except ServiceUnavailableError as error:
                trouble = str(error)
            age = time.monotonic() - read
            live.update(screen(snapshot, width=live.console.width, trouble=trouble, age=age), refresh=True)
            time.sleep(max(0.1, begin + REFRESH_SECONDS - time.monotonic()))
