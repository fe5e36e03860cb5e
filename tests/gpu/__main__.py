"""`make gpu`: checks and benchmark on a CUDA device, each in a process of its own; docs/gpu.md tells how to read the table.

python -m tests.gpu --device cuda:0 --out DIR
python -m tests.gpu --device cpu --part check --quick      a rehearsal of a few checks without a GPU
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SECONDS = 360.0
"""After this time no further check begins."""
JOBS = 8
"""Most checks at once; they share the device."""
NEEDED = (
    "torch",
    "transformers",
    "numpy",
    "PIL",
    "pytest",
    "pydantic_settings",
    "prometheus_client",
    "orjson",
    "av",
    "soundfile",
    "obstore",
)
"""Modules that every part needs. Celery, Redis and S3 are needed by the benchmark of the whole system alone."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a rehearsal (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for results and logs (%(default)s)"
    )
    parser.add_argument(
        "--part", choices=["check", "bench", "all"], default="all", help="which half to run (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few checks on a few items, to see that everything runs")
    parser.add_argument("--only", metavar="TEXT", help="checks whose name contains TEXT")
    parser.add_argument("--jobs", type=int, help=f"checks at once (the cores, at most {JOBS})")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="no check begins later than this (%(default).0f)"
    )
    found = parser.parse_args(arguments)
    if found.device != "cpu" and not found.device.startswith("cuda"):
        parser.error(f"--device is {found.device!r}; name cuda:N, or cpu for a rehearsal")
    if found.jobs is not None and found.jobs < 1:
        parser.error(f"--jobs is {found.jobs}; at least one check runs at a time")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 when a check has failed or a module is missing; 2 for wrong arguments."""
    options = parse(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # another look at the device spoils it for forked children
    if missing := _missing():
        print(f"these modules are missing: {', '.join(missing)}; install them, or put their folder on PYTHONPATH")
        return 1
    from tests.gpu import children, machine, report
    from tests.gpu.plan import FAILED, Order
    from tests.gpu.table import checks

    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    order = Order(options.device, options.quick, options.out.resolve())
    jobs = options.jobs or min(JOBS, len(os.sched_getaffinity(0)))

    def tell(result: object) -> None:
        print(report.line(result), flush=True)  # type: ignore[arg-type]

    (device,) = children.run_all([machine.CHECK], order, jobs=1, seconds=options.seconds, on_result=tell)
    if device.state == FAILED and order.on_gpu:
        print("a forked process cannot use the device; trying once more with processes that start anew", flush=True)
        children.Starts.way = "spawn"
        (device,) = children.run_all([machine.CHECK], order, jobs=1, seconds=options.seconds, on_result=tell)
    results = [device]
    if device.state != FAILED:
        left = options.seconds - (time.monotonic() - begin)
        chosen = checks(options.device, options.part, quick=options.quick, only=options.only)
        if not chosen:
            print(f"no check of these parts has {options.only!r} in its name")
            return 2
        results += children.run_all(chosen, order, jobs=jobs, seconds=left, on_result=tell)
    seconds = time.monotonic() - begin
    for one in results[1:]:
        if one.rows:
            print("\n".join(["", one.name, *report.figures(one.rows)]))
    report.write(options.out, device.rows[0] if device.rows else {}, results, seconds)
    print(f"\n{report.summary(results, seconds)}; see {options.out / 'results.md'} and results.json")
    return 1 if any(one.state == FAILED for one in results) else 0


def _missing() -> list[str]:
    found = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            found.append(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
