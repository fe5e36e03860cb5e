"""`pipefleet up`: Redis, S3, the fleet's workers and Flower on this machine, until Ctrl-C or SIGTERM.

`cli` registers it. It starts a `Stack` that follows the fleet file, and prints the settings that clients need. SIGHUP reads the
file at once. A wrong option or fleet file raises UsageError; a part that does not start or that ends raises StackError.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import (
    Commands,
    add_fleet_option,
    command,
    fleet_path,
    interrupt_on_sigterm,
    positive_seconds,
)
from pipefleet_workers.fleet.scaling.command import check_interval, port
from pipefleet_workers.observe import logs

if TYPE_CHECKING:
    from pipefleet.fleet.pools import Fleet
    from pipefleet_workers.fleet.local.edits import FleetEdits
    from pipefleet_workers.fleet.local.stack import Stack

DEFAULT_DATA = Path(".pipefleet")
OF_A_WORKER = (
    "torch", "transformers", "accelerate", "safetensors", "obstore", "numpy", "pandas", "PIL", "soundfile", "av", "orjson",
    "prometheus_client",
)  # fmt: skip
"""Modules without which no worker starts."""
NO_FLEET = "there is no fleet.toml here; name one with --fleet, or see `pipefleet demo` for a ready one"
DESCRIPTION = """\
Start Redis, S3, the fleet's workers and Flower on this machine, until Ctrl-C.

The fleet file may be edited meanwhile: pools that appear, go, change or are resized are taken over within seconds (at once
after kill -HUP), and the others are not touched. The workers of a changed pool are replaced: new ones start first, and those
before end when the new ones are ready and nothing waits for them alone, so for a while both are in memory. A wrong file is
refused with a sentence, and everything goes on as before.

A pool with `devices` has a worker for each of them, times `workers_per_device`; the workers of other pools are spread over the
GPUs of this machine, unless their `device` names one.

A worker that ends is started again, after 1, 2, 4 ... 60 s. One that ended eight times in a row, without five minutes of
being ready in between, stays down, while all others go on; `pipefleet top` and `pipefleet doctor` say so. It is tried again
every ten minutes, when the file changes its pool, and after kill -HUP."""


def register(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands, "up", up,
        help="start Redis, S3, the fleet's workers and Flower on this machine",
        description=DESCRIPTION,
        example="pipefleet up --fleet fleet.toml --env-file .env",
        needs=OF_A_WORKER, extra="local",
    )  # fmt: skip
    add_fleet_option(parser)
    add_data_option(parser)
    parser.add_argument("--env-file", type=Path, help="write the settings of clients there, as KEY=VALUE lines")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower out")
    _register_autoscaling(parser)
    parser.add_argument("--allow-unpinned", action="store_true", help="accept hub models without a revision")


def add_data_option(parser: argparse.ArgumentParser) -> None:
    """`--data`, the directory of a stack."""
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="the one directory for all data (.pipefleet)")


def _register_autoscaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autoscale", action="store_true",
        help="start and stop workers with the work, between workers.min and workers.max of each pool "
        "(without a max: as many as there are cores)",
    )  # fmt: skip
    options = {
        "--scale-interval": (positive_seconds, 5.0, "seconds between two looks at the queues (5, at most 60)"),
        "--cold-start": (positive_seconds, 10.0, "seconds from the start of a worker to its first job (10)"),
        "--scale-down-after": (
            positive_seconds, 60.0, "seconds for which fewer workers must be wanted until some are stopped (60)"
        ),
        "--scaler-port": (port, None, "port on which the scaler answers (a free one)"),
    }  # fmt: skip
    for name, (kind, default, text) in options.items():
        parser.add_argument(name, type=kind, default=default, help=f"with --autoscale: {text}")


def up(arguments: argparse.Namespace) -> int:
    """Run the embedded stack until Ctrl-C or SIGTERM."""
    from pipefleet_workers.fleet.local.edits import FleetEdits
    from pipefleet_workers.settings import load_worker_settings

    load_worker_settings()  # wrong settings are told before anything starts, and so is a wrong file
    file = FleetEdits(fleet_path(arguments, missing=NO_FLEET), allow_unpinned=arguments.allow_unpinned)
    fleet = file.read().fleet
    stack = _stack(arguments, file)
    logs.configure()
    interrupt_on_sigterm()
    reload_on_sighup(stack.request_reload)
    with contextlib.suppress(KeyboardInterrupt), stack:
        if arguments.env_file is not None:
            stack.write_env_file(arguments.env_file)
        _tell(stack, fleet, arguments.data)
        stack.supervise()
    return 0


def _tell(stack: Stack, fleet: Fleet, data: Path) -> None:
    """Print the settings of clients as shell commands, the addresses, and the pools that are not ready."""
    print("\n".join(f"export {name}={value}" for name, value in stack.environment().items()))
    if stack.flower is not None:
        print(f"# Flower: {stack.flower.url}  user pipefleet  password {stack.flower.password}")
    if stack.scaler_url is not None:
        print(f"# scaler: {stack.scaler_url}/pools")
    elif unasked := [pool.name for pool in fleet.pools.values() if pool.workers.min == 0 and pool.devices is None]:
        print(
            f"# one worker runs for each pool with min = 0 ({', '.join(unasked)}); --autoscale starts them with the work"
        )
    ready, silent = len(fleet.pools) - len(stack.silent_pools), ", ".join(stack.silent_pools)
    pools = f"{ready} of {len(fleet.pools)} pools (not yet: {silent})" if silent else f"{ready} pools"
    print(f"# ready: {pools}, data in {data}; Ctrl-C stops everything", flush=True)


def _stack(arguments: argparse.Namespace, file: FleetEdits) -> Stack:
    from pipefleet_workers.fleet.local.autoscale import Pace
    from pipefleet_workers.fleet.local.stack import Stack
    from pipefleet_workers.fleet.local.workers import worker_command

    command = functools.partial(worker_command, allow_unpinned=arguments.allow_unpinned)
    stack = Stack(arguments.data, flower=not arguments.no_flower, worker_command=command)
    if not arguments.autoscale:
        return stack.follow(file)
    check_interval(arguments.scale_interval, "--scale-interval")
    pace = Pace(arguments.scale_interval, arguments.cold_start, arguments.scale_down_after, arguments.scaler_port)
    return stack.follow(file, least=0).autoscale(pace)


def _interrupt() -> None:
    raise KeyboardInterrupt


def reload_on_sighup(reload: Callable[[], None], *, gone: Callable[[], None] = _interrupt) -> None:
    """Call `reload` at SIGHUP. If the terminal of this process is gone, call `gone`, which by default interrupts it."""
    terminal = next((number for number in (0, 1, 2) if os.isatty(number)), None)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        terminal = None  # under nohup: goes on without

    def hang_up(number: int, frame: Any) -> None:
        if terminal is not None and not os.isatty(terminal):
            return gone()
        reload()

    signal.signal(signal.SIGHUP, hang_up)
