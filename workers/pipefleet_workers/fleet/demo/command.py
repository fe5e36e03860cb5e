"""The command `pipefleet demo`: a fleet with two packaged models, and two bulk jobs on it.

`cli` registers it; `run` does the work. The exit code is 1 if an item failed. A missing package raises UsageError.
"""

from __future__ import annotations

import argparse
import sys

from pipefleet.cli.common import Commands, command
from pipefleet_workers.fleet.local.command import OF_A_WORKER, add_data_option


def register(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands, "demo", demo,
        help="start a fleet with two packaged models and run two bulk jobs on it",
        example="pipefleet demo",
        needs=OF_A_WORKER, extra="demo",
    )  # fmt: skip
    add_data_option(parser)


def demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration; on a terminal the fleet stays up until Ctrl-C."""
    from pipefleet_workers.fleet.demo.run import run_demo

    return run_demo(arguments.data, stay=sys.stdout.isatty())
