"""The command `pipefleet scaler`: serves the autoscaling signal and the fleet's metrics over HTTP.

`cli` registers it. The fleet file names the pools. With `--json-once` it prints one reading as JSON and ends.
It raises UsageError without a fleet file, for an interval above 60 s and for a port in use. While Redis is away, the service
answers 503 and goes on, but `--json-once` raises ServiceUnavailableError.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import TYPE_CHECKING

from pipefleet.cli.common import (
    Commands,
    add_fleet_option,
    command,
    fleet_path,
    interrupt_on_sigterm,
    positive_seconds,
    print_json,
)
from pipefleet.errors import UsageError
from pipefleet_workers.observe import logs

if TYPE_CHECKING:
    from pipefleet.fleet.pools import Fleet

DEFAULT_PORT = 9180
NO_FLEET = "name a fleet file with --fleet or PIPEFLEET_FLEET: it says how many workers a pool may have"


def register(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands, "scaler", scaler,
        help="serve the number of workers that each pool should have, and the fleet's metrics",
        example="pipefleet scaler --fleet fleet.toml --port 9180",
        needs=("prometheus_client",),
    )  # fmt: skip
    add_fleet_option(parser)
    parser.add_argument("--port", type=port, default=DEFAULT_PORT, help="port to serve on (9180); 0 takes a free one")
    parser.add_argument("--address", default="127.0.0.1", help="address to serve on (loopback)")
    parser.add_argument(
        "--interval", type=positive_seconds, default=15.0, help="seconds between two readings (15, at most 60)"
    )
    parser.add_argument(
        "--cold-start",
        type=positive_seconds,
        default=180.0,
        help="seconds from the start of a worker to its first job (180)",
    )
    parser.add_argument(
        "--scale-down-after", type=positive_seconds, default=300.0, metavar="SECONDS",
        help="seconds for which fewer workers must be wanted until fewer are asked for (300)",
    )  # fmt: skip
    parser.add_argument("--json-once", action="store_true", help="read once, print one JSON list, change nothing")


def scaler(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM; with --json-once, print one reading."""
    from pipefleet.settings import load_settings
    from pipefleet_workers.delivery.redis_start import refuse_unusable
    from pipefleet_workers.fleet.scaling.service import Scaler, ScalerService

    check_interval(arguments.interval, "--interval")
    settings = load_settings()
    refuse_unusable(settings)
    reader = Scaler(_fleet(arguments), settings, cold_start=arguments.cold_start, hold=arguments.scale_down_after)
    if arguments.json_once:
        print_json([status.to_json() for status in reader.tick(remember=False).values()])
        return 0
    logs.configure()
    interrupt_on_sigterm()
    try:
        service = ScalerService(reader, interval=arguments.interval, address=arguments.address, port=arguments.port)
    except OSError as error:
        where = f"{arguments.address}:{arguments.port}"
        raise UsageError(f"cannot serve on {where} ({error.strerror}); choose another --port") from None
    with contextlib.suppress(KeyboardInterrupt), service:
        print(f"scaler: http://{arguments.address}:{service.port}/pools; Ctrl-C stops it", flush=True)
        service.wait()
    return 0


def check_interval(interval: float, option: str) -> None:
    """Raise UsageError if readings lie more than 60 s apart. `option` is the name of the option in the message."""
    if interval > 60:
        raise UsageError(f"{option} must be at most 60 seconds; longer, and what arrives between two is not understood")


def _fleet(arguments: argparse.Namespace) -> Fleet:
    from pipefleet.fleet.file import load_fleet

    # The workers decide what is pinned.
    return load_fleet(fleet_path(arguments, missing=NO_FLEET), allow_unpinned=True)


def port(text: str) -> int:
    """A port number, 0 for a free one, as an option's type."""
    number = int(text)
    if not 0 <= number <= 65_535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return number
