"""The subcommands that need the worker package: `up`, `worker`, `doctor` and `demo`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import Commands, command, interrupt_on_sigterm, print_json, print_line
from pipefleet.errors import UsageError
from pipefleet_workers.fleet.render import command as render
from pipefleet_workers.fleet.scaling import command as scaler
from pipefleet_workers.fleet.simulation import command as simulation
from pipefleet_workers.fleet.top import command as watch
from pipefleet_workers.observe import logs

if TYPE_CHECKING:
    from pipefleet.fleet.pools import Fleet, Pool
    from pipefleet_workers.fleet.local import Stack
    from pipefleet_workers.fleet.local.fleet_file import WatchedFile

log = logging.getLogger(__name__)
DEFAULT_DATA = Path(".pipefleet")
OF_A_WORKER = (
    "torch", "transformers", "accelerate", "safetensors", "obstore", "numpy", "pandas", "PIL", "soundfile", "av", "orjson",
    "prometheus_client",
)  # fmt: skip
"""Modules without which no worker starts."""
UP = """\
Start Redis, S3, the fleet's workers and Flower on this machine, until Ctrl-C.

The fleet file may be edited meanwhile: pools that appear, go, change or are resized are taken over within seconds (at once
after kill -HUP), and the others are not touched. The workers of a changed pool are replaced: new ones start first, and those
before end when the new ones are ready and nothing waits for them alone, so for a while both are in memory. A wrong file is
refused with a sentence, and everything goes on as before.

A worker that ends is started again, after 1, 2, 4 ... 60 s. One that ended eight times in a row, without five minutes of
being ready in between, stays down, while all others go on; `pipefleet top` and `pipefleet doctor` say so. It is tried again
every ten minutes, when the file changes its pool, and after kill -HUP."""


def register(commands: Commands) -> None:
    """Add the commands of this module."""
    parser = command(
        commands, "up", up,
        help="start Redis, S3, the fleet's workers and Flower on this machine",
        example="pipefleet up --fleet fleet.toml --env-file .env",
        needs=OF_A_WORKER, extra="local",
    )  # fmt: skip
    parser.description = UP
    parser.add_argument("--fleet", type=Path, help="the fleet file (default: PIPEFLEET_FLEET, then ./fleet.toml)")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="the one directory for all data (.pipefleet)")
    parser.add_argument("--env-file", type=Path, help="write the settings of clients there, as KEY=VALUE lines")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower out")
    _register_autoscaling(parser)
    parser.add_argument("--allow-unpinned", action="store_true", help="accept hub models without a revision")
    _register_worker(commands)
    parser = command(
        commands, "doctor", doctor,
        help="check Redis, S3, models, decoders and the device, and say what to mend",
        example="pipefleet doctor --json",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--adopt-store", action="store_true",
        help="first make PIPEFLEET_STORE the store of Redis's fleet: after it was moved; workers with another one end",
    )  # fmt: skip
    parser = command(
        commands, "demo", demo,
        help="start a fleet with two packaged models and run two bulk jobs on it",
        example="pipefleet demo",
        needs=OF_A_WORKER, extra="demo",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="the one directory for all data (.pipefleet)")
    for further in (scaler, simulation, render, watch):
        further.register(commands)


def _register_autoscaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autoscale", action="store_true",
        help="start and stop workers with the work, between workers.min and workers.max of each pool "
        "(without a max: as many as there are cores)",
    )  # fmt: skip
    options = {
        "--scale-interval": (scaler.seconds, 5.0, "seconds between two looks at the queues (5, at most 60)"),
        "--cold-start": (scaler.seconds, 10.0, "seconds from the start of a worker to its first job (10)"),
        "--scale-down-after": (
            scaler.seconds, 60.0, "seconds for which fewer workers must be wanted until some are stopped (60)"
        ),
        "--scaler-port": (scaler.port, None, "port on which the scaler answers (a free one)"),
    }  # fmt: skip
    for name, (kind, default, text) in options.items():
        parser.add_argument(name, type=kind, default=default, help=f"with --autoscale: {text}")


def _register_worker(commands: Commands) -> None:
    parser = command(
        commands, "worker", worker,
        help="run one worker: one process, one model",
        example="pipefleet worker --pool speech --device cuda:0",
        needs=OF_A_WORKER,
    )  # fmt: skip
    parser.add_argument("--fleet", type=Path, help="the fleet file (default: PIPEFLEET_FLEET, then ./fleet.toml)")
    parser.add_argument("--pool", help="a pool of the fleet file")
    parser.add_argument("--previous", action="store_true", help="serve the revision that the pool is leaving")
    parser.add_argument("--task", help="without a fleet file: the task to serve")
    parser.add_argument("--model", help="hub name, folder or s3:// prefix; with a fleet file: another than the pool's")
    parser.add_argument("--revision", help="the revision of a hub model")
    parser.add_argument("--device", help="auto, cpu or cuda:N (default: the pool's)")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU (default: all cores)")
    parser.add_argument("--ready-file", type=Path, help="file that is written once the worker consumes")
    parser.add_argument("--allow-unpinned", action="store_true", help="accept a hub model without a revision")


def worker(arguments: argparse.Namespace) -> int:
    """Run a worker until SIGTERM."""
    from pipefleet.fleet.followed_file import FleetFile
    from pipefleet.settings import load_settings
    from pipefleet_workers.settings import WorkerSettings
    from pipefleet_workers.worker import Worker, prepare_process

    prepare_process(threads=arguments.threads)
    settings = load_settings()
    fleet, pool, path = _chosen_pool(arguments, settings.fleet_path)
    worker_settings = WorkerSettings()
    now = worker_settings.fleet_now or path
    one = Worker(fleet, pool, settings, worker_settings, None if now is None else FleetFile(now, known=fleet))
    logs.configure(pool=pool.name, worker=one.name)
    if idle := fleet.idle_pools().get(pool.key):
        log.warning("%s", idle)
    with logs.errors_as_lines():
        return one.run(device=arguments.device, ready_file=arguments.ready_file)


def up(arguments: argparse.Namespace) -> int:
    """Run the embedded stack until Ctrl-C or SIGTERM."""
    from pipefleet.settings import load_settings
    from pipefleet_workers.fleet.local.fleet_file import WatchedFile

    path = arguments.fleet or load_settings().fleet_path
    if path is None:
        raise UsageError("there is no fleet.toml here; name one with --fleet, or see `pipefleet demo` for a ready one")
    file = WatchedFile(path, allow_unpinned=arguments.allow_unpinned)
    fleet = file.read().fleet  # a wrong file is told before anything starts
    stack = _stack(arguments, file)
    logs.configure()
    interrupt_on_sigterm()
    reload_on_sighup(stack.request_reload)
    with contextlib.suppress(KeyboardInterrupt), stack:
        if arguments.env_file is not None:
            stack.write_env_file(arguments.env_file)
        print("\n".join(f"export {name}={value}" for name, value in stack.environment().items()))
        if stack.flower is not None:
            print(f"# Flower: {stack.flower.url}  user pipefleet  password {stack.flower.password}")
        if stack.scaler_url is not None:
            print(f"# scaler: {stack.scaler_url}/pools")
        elif unasked := [pool.name for pool in fleet.pools.values() if pool.workers.min == 0]:
            print(
                f"# one worker runs for each pool with min = 0 ({', '.join(unasked)}); --autoscale starts them with the work"
            )
        ready, silent = len(fleet.pools) - len(stack.silent_pools), ", ".join(stack.silent_pools)
        pools = f"{ready} of {len(fleet.pools)} pools (not yet: {silent})" if silent else f"{ready} pools"
        print(f"# ready: {pools}, data in {arguments.data}; Ctrl-C stops everything", flush=True)
        stack.supervise()
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Print every check; 1 when one of them failed."""
    from pipefleet_workers.fleet.doctor.doctor import adopt_store, run_checks

    if arguments.adopt_store:
        print(adopt_store(), file=sys.stderr)
    checks = run_checks()
    if arguments.json:
        print_json({"ok": all(one.ok for one in checks), "checks": [one.to_json() for one in checks]})
    else:
        for one in checks:
            print_line(f"{'ok  ' if one.ok else 'FAIL'}  {one.name}: {one.detail}")
    return int(not all(one.ok for one in checks))


def demo(arguments: argparse.Namespace) -> int:
    """Run the demonstration; on a terminal the fleet stays up until Ctrl-C."""
    from pipefleet_workers.fleet.demo.run import run_demo

    return run_demo(arguments.data, stay=sys.stdout.isatty())


def _stack(arguments: argparse.Namespace, file: WatchedFile) -> Stack:
    from pipefleet_workers.fleet.local import Stack
    from pipefleet_workers.fleet.local.autoscale import Pace
    from pipefleet_workers.fleet.local.workers import worker_command

    command = functools.partial(worker_command, allow_unpinned=arguments.allow_unpinned)
    stack = Stack(arguments.data, flower=not arguments.no_flower, worker_command=command)
    if not arguments.autoscale:
        return stack.follow(file)
    scaler.check_interval(arguments.scale_interval, "--scale-interval")
    pace = Pace(arguments.scale_interval, arguments.cold_start, arguments.scale_down_after, arguments.scaler_port)
    return stack.follow(file, least=0).autoscale(pace)


def reload_on_sighup(reload: Callable[[], None]) -> None:
    """Call `reload` at SIGHUP; unless the terminal of this process is gone, which ends it as Ctrl-C does."""
    terminal = next((number for number in (0, 1, 2) if os.isatty(number)), None)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        terminal = None  # under nohup: goes on without

    def hang_up(number: int, frame: Any) -> None:
        if terminal is not None and not os.isatty(terminal):
            raise KeyboardInterrupt
        reload()

    signal.signal(signal.SIGHUP, hang_up)


def _chosen_pool(arguments: argparse.Namespace, path: Path | None) -> tuple[Fleet, Pool, Path | None]:
    from pipefleet.fleet.pools import load_fleet, parse_fleet

    path = arguments.fleet or path
    if arguments.task or (arguments.model and path is None):
        return *_single_pool(arguments, parse_fleet), None
    if path is None:
        raise UsageError("name a fleet file with --fleet, or a --task and a --model")
    fleet = load_fleet(path, allow_unpinned=arguments.allow_unpinned)
    if arguments.pool is None and len(fleet.pools) > 1:
        raise UsageError(f"the fleet has several pools; choose one with --pool: {', '.join(fleet.pools)}")
    pool = fleet.pool(arguments.pool or next(iter(fleet.pools)))
    return fleet, _chosen_revision(arguments, pool), path


def _chosen_revision(arguments: argparse.Namespace, pool: Pool) -> Pool:
    """The revision of a pool of the fleet file that was asked for; new work goes to none but the pool's own."""
    from pipefleet.fleet.pools import with_revision

    if arguments.previous:
        if arguments.model or arguments.revision:
            raise UsageError("--previous is the revision that the fleet file names; leave --model and --revision out")
        if not pool.previous:
            raise UsageError(f"pool {pool.name} has no `previous` in the fleet file; name a --model and a --revision")
        return pool.previous[0]
    if not arguments.model and not arguments.revision:
        return pool
    model = arguments.model or pool.model
    return with_revision(pool, model, arguments.revision, allow_unpinned=arguments.allow_unpinned)


def _single_pool(arguments: argparse.Namespace, parse_fleet: Any) -> tuple[Fleet, Pool]:
    if not arguments.task or not arguments.model:
        raise UsageError("--task and --model belong together")
    name = arguments.pool or "default"
    table = {"task": arguments.task, "model": arguments.model}
    if arguments.revision:
        table["revision"] = arguments.revision
    fleet = parse_fleet({"pools": {name: table}}, base=Path.cwd(), allow_unpinned=arguments.allow_unpinned)
    return fleet, fleet.pool(name)
