"""Registers the subcommands that need the worker package. Here is `pipefleet worker`; the others lie in the rooms of `fleet`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefleet.cli.common import Commands, add_fleet_option, command
from pipefleet.errors import UsageError
from pipefleet_workers.fleet.demo import command as demo
from pipefleet_workers.fleet.doctor import command as doctor
from pipefleet_workers.fleet.local import command as local
from pipefleet_workers.fleet.render import command as render
from pipefleet_workers.fleet.scaling import command as scaling
from pipefleet_workers.fleet.simulation import command as simulation
from pipefleet_workers.fleet.top import command as top
from pipefleet_workers.observe import logs

if TYPE_CHECKING:
    from pipefleet.fleet.devices import Devices
    from pipefleet.fleet.pools import Fleet, Pool

log = logging.getLogger(__name__)
MOST_THREADS = 1024
"""OpenMP ignores other numbers, or ends the process."""
DESCRIPTION = """\
Run one worker: one process, one model. With --devices, or for a pool with `devices` in the fleet file and without --device,
supervise a worker for each device, each a process of its own, until SIGTERM.

A worker that ends is started again, after 1, 2, 4 ... 60 s; after eight times in a row it is tried every ten minutes and after
kill -HUP, and the others go on. A worker that cannot start at all, such as with a model that does not load, ends all with its
exit code. SIGTERM or Ctrl-C drains all; a second signal gives their work back at once. Each log line has the device in front.
The first worker serves its metrics on PIPEFLEET_WORKER_METRICS_PORT, the others on the ports after it."""


def register(commands: Commands) -> None:
    """Add every command of the workers, in the order in which `pipefleet --help` lists them."""
    local.register(commands)
    _register_worker(commands)
    for module in (doctor, demo, scaling, simulation, render, top):
        module.register(commands)


def _register_worker(commands: Commands) -> None:
    parser = command(
        commands, "worker", worker,
        help="run one worker, or one for each device of this host",
        description=DESCRIPTION,
        example="pipefleet worker --pool speech --devices all",
        needs=local.OF_A_WORKER,
    )  # fmt: skip
    add_fleet_option(parser)
    parser.add_argument("--pool", help="a pool of the fleet file")
    parser.add_argument("--previous", action="store_true", help="serve the revision that the pool is leaving")
    parser.add_argument("--task", help="without a fleet file: the task to serve")
    parser.add_argument("--model", help="hub name, folder or s3:// prefix; with a fleet file: another than the pool's")
    parser.add_argument("--revision", help="the revision of a hub model")
    parser.add_argument("--device", help="auto, cpu or cuda:N (default: the pool's)")
    parser.add_argument("--devices", help="all, a number of GPUs, or cuda:0,cuda:2: a worker for each, supervised")
    parser.add_argument("--workers-per-device", type=int, metavar="N", help="workers on each of the devices (1)")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU (default: all cores)")
    parser.add_argument(
        "--ready-file", type=Path, help="file that is there while the worker consumes; with --devices, while all do"
    )
    parser.add_argument("--allow-unpinned", action="store_true", help="accept a hub model without a revision")


def worker(arguments: argparse.Namespace) -> int:
    """Run a worker, or one for each device, until SIGTERM."""
    if logs.as_json():
        logs.configure()  # and again with the name of the pool: a wrong fleet file is a line of the log too
    with logs.errors_as_lines():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from pipefleet.fleet.latest import LatestFleet
    from pipefleet.settings import load_settings
    from pipefleet_workers.settings import load_worker_settings
    from pipefleet_workers.worker import Worker, prepare_process

    settings, worker_settings = load_settings(), load_worker_settings()
    if arguments.threads is not None and not 1 <= arguments.threads <= MOST_THREADS:
        raise UsageError(f"--threads must be a whole number from 1 to {MOST_THREADS}")
    fleet, pool, path = _chosen_pool(arguments, settings.fleet_path)
    if (devices := _devices(arguments, pool)) is not None:
        return _supervised(arguments, pool, devices)
    prepare_process(threads=arguments.threads)
    now = worker_settings.fleet_now or path
    one = Worker(fleet, pool, settings, worker_settings, None if now is None else LatestFleet(now, known=fleet))
    logs.configure(pool=pool.name, worker=one.name)
    if idle := fleet.idle_pools().get(pool.key):
        log.warning("%s", idle)
    return one.run(device=arguments.device, ready_file=arguments.ready_file)


def _devices(arguments: argparse.Namespace, pool: Pool) -> Devices | None:
    """The devices that get a worker each; None for one worker in this process. Raises UsageError for options that contradict."""
    from pipefleet.fleet.devices import MOST, read_devices

    if arguments.workers_per_device is not None and not 1 <= arguments.workers_per_device <= MOST:
        raise UsageError(f"--workers-per-device must be a whole number from 1 to {MOST}")
    if arguments.device is not None and (arguments.devices is not None or arguments.workers_per_device is not None):
        raise UsageError("--device is for one worker; name --devices instead, which has one or several for each device")
    devices: Devices | None = pool.devices if arguments.device is None else None
    if arguments.devices is not None:
        devices = read_devices("--devices", arguments.devices)
        if pool.device_map is not None:
            raise UsageError(
                f"pool {pool.name} has device_map, which spreads one model over all GPUs; leave --devices out"
            )
    if devices is None and arguments.workers_per_device is not None:
        raise UsageError("--workers-per-device needs --devices, or a pool with `devices`")
    return devices


def _supervised(arguments: argparse.Namespace, pool: Pool, devices: Devices) -> int:
    """Run a worker of this command for each device, under one supervisor."""
    from pipefleet_workers.fleet.local.supervise import supervise

    logs.configure(pool=pool.name)
    named = {name: getattr(arguments, name) for name in ("fleet", "task", "model", "revision")}
    # By its name also where it is the only pool: the file may have others when a worker starts again.
    named["pool"] = arguments.pool or pool.name
    flags = {name: getattr(arguments, name) for name in ("previous", "allow_unpinned")}
    options = [f"--{name}={one}" for name, one in named.items() if one is not None]
    options += [f"--{name.replace('_', '-')}" for name, one in flags.items() if one]
    per_device = arguments.workers_per_device or pool.workers_per_device
    return supervise(pool.key, devices, per_device, options, ready_file=arguments.ready_file, threads=arguments.threads)


def _chosen_pool(arguments: argparse.Namespace, path: Path | None) -> tuple[Fleet, Pool, Path | None]:
    from pipefleet.fleet.file import load_fleet, parse_fleet

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
    from pipefleet.fleet.file import with_revision

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
