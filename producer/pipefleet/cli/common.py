"""Shared parts of the commands: declaring a command, reading parameters, printing results and errors."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefleet.errors import ParameterError, ServiceUnavailableError, UsageError
from pipefleet.installed import is_installed
from pipefleet.printable import MOST_MESSAGE, LineFormatter, printable, printable_json, printable_lines

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = Any


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    example: str,
    description: str | None = None,
    needs: Sequence[str] = (),
    extra: str = "workers",
) -> argparse.ArgumentParser:
    """Declare one command. Its own help begins with `description`, or with `help` as a sentence, and ends with `example`.

    `needs` are modules that the package's `extra` brings.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=functools.partial(_run_with, name, needs, extra, run) if needs else run)
    return parser


def add_fleet_option(parser: argparse.ArgumentParser) -> None:
    """`--fleet`; `fleet_path` reads it."""
    parser.add_argument("--fleet", type=Path, help="the fleet file (default: PIPEFLEET_FLEET, then ./fleet.toml)")


def fleet_path(arguments: argparse.Namespace, *, missing: str) -> Path:
    """The fleet file of `--fleet`, else that of the settings. Raises UsageError with the text `missing` where both lack one."""
    from pipefleet.settings import load_settings

    path: Path | None = arguments.fleet or load_settings().fleet_path
    if path is None:
        raise UsageError(missing)
    return path


def add_json_option(parser: argparse.ArgumentParser, text: str = "print one JSON document") -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help=text)


def _run_with(
    name: str, needs: Sequence[str], extra: str, run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace
) -> int:
    """Run a command. Raises UsageError, before it starts, where a module that it needs is not installed."""
    missing = [module for module in needs if not is_installed(module)]
    if missing:
        raise UsageError(
            f"`pipefleet {name}` needs packages that are not installed here ({', '.join(missing)}): "
            f"pip install 'pipefleet[{extra}]'"
        )
    return run(arguments)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--revision`, `--param` and `--strict-media`."""
    parser.add_argument("--model", help="a model that a pool of the fleet serves (default: the task's default pool)")
    parser.add_argument("--revision", help="its revision")
    parser.add_argument(
        "--param", action="append", default=[], metavar="K=V",
        help="a parameter of the task, its value as JSON or as a plain word; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--strict-media", action="store_true",
        help="refuse recordings and films that are damaged or lack their end, instead of warning of it",
    )  # fmt: skip


def read_call(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters of a call, from `--param` and `--strict-media`. Raises ParameterError."""
    parameters = read_parameters(arguments.param)
    return {**parameters, "strict_media": True} if arguments.strict_media else parameters


def read_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """`["top_k=3", "pooling=mean"]` as a dict. Raises ParameterError for a pair without `=`."""
    parameters: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ParameterError(f"--param takes NAME=VALUE, not {pair[:60]!r}")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            parameters[name] = value
    return parameters


def seconds(text: str) -> float:
    """A time of 0 seconds or more, as an option's type. Raises ArgumentTypeError for any other text."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no number of seconds")
    return value


def positive_seconds(text: str) -> float:
    """A time above 0 seconds, as an option's type. Raises ArgumentTypeError for any other text."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be above 0 seconds")
    return value


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print the package's warnings inside of the block, such as a queue that nobody serves, as lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("pipefleet: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("pipefleet")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, safe for a terminal."""
    print(printable_json(value, indent=2, encoding=sys.stdout.encoding))


def print_error(text: object) -> None:
    """Print an error, a warning or a remark of a command on stderr, safe for a terminal."""
    print(printable_lines(str(text)), file=sys.stderr)


def print_line(text: str) -> None:
    """Print one line of a command's answer on stdout, safe for a terminal."""
    print(printable(text, MOST_MESSAGE))


def print_troubles(troubles: Iterable[str]) -> int:
    """Print on stderr which parts of an answer could not be read, and why. Returns the exit code: 3 if there are any, else 0."""
    found = list(troubles)
    for trouble in found:
        print_error(f"pipefleet: {trouble}")
    return ServiceUnavailableError.exit_code if found else 0


def interrupt_on_sigterm() -> None:
    """Let SIGTERM act as Ctrl-C: it unwinds, so that everything that was started is stopped."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
