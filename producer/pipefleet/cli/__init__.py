"""The `pipefleet` command. Other packages add subcommands through the entry-point group `pipefleet.commands`.

Each module here has a `register` that adds its commands; `main` runs the chosen one and prints its error as one line on stderr.
Exit codes: 0 done; 1 items failed; 2 usage or bad input; 3 a service or a pool is away; 4 not ended in time; 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import NoReturn

from pipefleet._version import __version__
from pipefleet.cli import fleet, jobs, runs
from pipefleet.cli.common import Commands, print_error
from pipefleet.errors import PipefleetError
from pipefleet.printable import MOST_MESSAGE, LineFormatter, printable

GROUP = "pipefleet.commands"
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code. An error of this package becomes one line on stderr."""
    _show_every_character()
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    if logging.lastResort is not None:  # it shows warnings until a command sets up logs of its own
        logging.lastResort.setFormatter(LineFormatter("pipefleet: %(message)s"))
    try:
        return int(chosen.run(chosen))
    except PipefleetError as error:
        print_error(f"pipefleet: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("pipefleet: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader of our output has ended, so end without a word
        return 0


def _show_every_character() -> None:
    """Escape characters that the terminal's encoding lacks, as Python does on stderr: a name must not end a command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Parser(argparse.ArgumentParser):
    """Escapes the arguments that its errors repeat: they may be names of files that others chose."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, MOST_MESSAGE))


def build_parser() -> argparse.ArgumentParser:
    """The parser, with the commands of every installed package."""
    parser: argparse.ArgumentParser = _Parser(
        prog="pipefleet",
        description="Hugging Face pipelines over buckets of media and text, on a fleet of workers.",
        epilog="Start a fleet on this machine with `pipefleet up`.",
    )
    parser.add_argument("--version", action="version", version=f"pipefleet {__version__}")
    commands: Commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (jobs, runs, fleet):
        module.register(commands)
    for plugin in sorted(entry_points(group=GROUP), key=lambda one: one.name):
        plugin.load()(commands)
    return parser
