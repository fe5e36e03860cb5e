"""The command `pipefleet render`: writes or checks the deploy files of every pool, from the fleet file.

`cli` registers it. The files go to a folder; with `--check` nothing is written, differences go to stderr, and any difference makes
the exit code 1. A wrong fleet file raises FleetFileError; a wrong option or a folder that cannot be written raises UsageError.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipefleet.cli.common import Commands, add_fleet_option, command, fleet_path
from pipefleet_workers.fleet.render.pools import DRAIN_SECONDS, NAMESPACE, RenderOptions

OUTPUTS = {"compose": Path("deploy/compose"), "kubernetes": Path("deploy/kubernetes/pools")}


def register(commands: Commands) -> None:
    """Add the command `render`."""
    parser = command(
        commands, "render", render,
        help="write the Compose or Kubernetes files of the fleet's pools",
        example="pipefleet render kubernetes --fleet deploy/fleet.toml --check",
    )  # fmt: skip
    parser.add_argument("target", choices=sorted(OUTPUTS), help="which files")
    add_fleet_option(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help="where they go (default: deploy/compose, deploy/kubernetes/pools)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not up to date")
    parser.add_argument(
        "--drain", type=int, default=DRAIN_SECONDS, metavar="SECONDS",
        help=f"how long started work may take after SIGTERM ({DRAIN_SECONDS}); the grace period follows from it",
    )  # fmt: skip
    parser.add_argument("--namespace", default=NAMESPACE, help=f"where the scaler lives in Kubernetes ({NAMESPACE})")


def render(arguments: argparse.Namespace) -> int:
    """Write the files, or with --check name each that is out of date and return 1."""
    from pipefleet_workers.fleet.render.files import differences, rendered, write

    path = fleet_path(arguments, missing="there is no fleet.toml here; name one with --fleet")
    folder = arguments.output or OUTPUTS[arguments.target]
    wanted = rendered(arguments.target, path, RenderOptions(arguments.drain, arguments.namespace))
    if not arguments.check:
        write(wanted, folder)
        print(f"{len(wanted)} files in {folder}")
        return 0
    found = differences(wanted, folder)
    for one in found:
        print(f"pipefleet: {one}; run the same command without --check", file=sys.stderr)
    return int(bool(found))
