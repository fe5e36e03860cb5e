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

from tests.gpu.plan import FAILED, Check, Order, Result

SECONDS = 360.0
"""After this time nothing runs any more."""
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
        "--seconds", type=float, default=SECONDS, help="the whole run ends after this time (%(default).0f)"
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
    # torch looks for devices when libraries are imported; another way of looking would spoil the device for forked children.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if missing := _missing():
        print(f"these modules are missing: {', '.join(missing)}; install them, or put their folder on PYTHONPATH")
        return 1
    from tests.gpu.table import checks

    chosen = checks(options.device, options.part, quick=options.quick, only=options.only)
    if not chosen:
        print(f"no check of these parts has {options.only!r} in its name")
        return 2
    return _run(options, chosen)


def _run(options: argparse.Namespace, chosen: list[Check]) -> int:
    """Ask the device first; without its answer no other check makes sense."""
    from tests.gpu import children, machine, report

    begin = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    order = Order(options.device, options.quick, options.out.resolve())

    def run(some: list[Check], jobs: int) -> list[Result]:
        left = options.seconds - (time.monotonic() - begin)
        return children.run_all(
            some, order, jobs=jobs, seconds=left, on_result=lambda one: print(report.line(one), flush=True)
        )

    (device,) = run([machine.CHECK], 1)
    if device.state == FAILED and order.on_gpu:
        print("the device did not answer a forked process; trying once more with one that starts anew", flush=True)
        children.Starts.way = "spawn"
        (device,) = run([machine.CHECK], 1)
    jobs = options.jobs or min(JOBS, len(os.sched_getaffinity(0)))
    results = run(chosen, jobs) if device.state != FAILED else []
    for one in results:
        if one.rows:
            print("\n".join(["", one.name, *report.figures(one.rows)]))
    seconds, results = time.monotonic() - begin, [device, *results]
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
