"""The command `pipefleet doctor`: prints the checks of a fleet; with `--adopt-store` it first moves the fleet to another store.

`cli` registers it. The report goes to stdout, as text or as JSON; the exit code is 1 if a check failed.
A wrong setting, or a store that cannot be adopted, raises PipefleetError before the first check.
"""

from __future__ import annotations

import argparse
import sys

from pipefleet.cli.common import Commands, add_json_option, command, print_json, print_line


def register(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands, "doctor", doctor,
        help="check Redis, S3, models, decoders and the device, and say what to mend",
        example="pipefleet doctor --json",
    )  # fmt: skip
    add_json_option(parser)
    parser.add_argument(
        "--adopt-store", action="store_true",
        help="first make PIPEFLEET_STORE the store of Redis's fleet: after it was moved; workers with another one end",
    )  # fmt: skip


def doctor(arguments: argparse.Namespace) -> int:
    """Print every check; 1 when one of them failed."""
    from pipefleet_workers.fleet.doctor.fleet import adopt_store
    from pipefleet_workers.fleet.doctor.report import run_checks

    if arguments.adopt_store:
        print(adopt_store(), file=sys.stderr)
    checks = run_checks()
    if arguments.json:
        print_json({"ok": all(one.ok for one in checks), "checks": [one.to_json() for one in checks]})
    else:
        for one in checks:
            print_line(f"{'ok  ' if one.ok else 'FAIL'}  {one.name}: {one.detail}")
    return int(not all(one.ok for one in checks))
