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
    from pipefleet.fleet.pools import Fleet, Pool

log = logging.getLogger(__name__)


def register(commands: Commands) -> None:
    """Add every command of the workers, in the order in which `pipefleet --help` lists them."""
    local.register(commands)
    _register_worker(commands)
    for module in (doctor, demo, scaling, simulation, render, top):
        module.register(commands)


def _register_worker(commands: Commands) -> None:
    parser = command(
        commands, "worker", worker,
        help="run one worker: one process, one model",
        example="pipefleet worker --pool speech --device cuda:0",
        needs=local.OF_A_WORKER,
    )  # fmt: skip
    add_fleet_option(parser)
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
    from pipefleet.fleet.latest import LatestFleet
    from pipefleet.settings import load_settings
    from pipefleet_workers.settings import WorkerSettings
    from pipefleet_workers.worker import Worker, prepare_process

    prepare_process(threads=arguments.threads)
    settings = load_settings()
    fleet, pool, path = _chosen_pool(arguments, settings.fleet_path)
    worker_settings = WorkerSettings()
    now = worker_settings.fleet_now or path
    one = Worker(fleet, pool, settings, worker_settings, None if now is None else LatestFleet(now, known=fleet))
    logs.configure(pool=pool.name, worker=one.name)
    if idle := fleet.idle_pools().get(pool.key):
        log.warning("%s", idle)
    with logs.errors_as_lines():
        return one.run(device=arguments.device, ready_file=arguments.ready_file)


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
