"""Memory of the worker over one long bulk run: resident size, sampled, at its beginning, middle and end."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.benchmarks import system
from tests.benchmarks.system import System
from tests.benchmarks.workloads import Workload

EVERY_SECONDS = 0.1


def measure(running: System, workload: Workload) -> dict[str, Any]:
    """MiB of the worker in the first, middle and last tenth of the run, and at its peak."""
    with _sampled(running.processes["worker"]) as samples:
        measured = system.measure(running, workload)
    tenth = max(1, len(samples) // 10)
    middle = len(samples) // 2
    parts = {"first": samples[:tenth], "middle": samples[middle : middle + tenth], "last": samples[-tenth:]}
    row: dict[str, Any] = {
        f"{name}_mib": round(statistics.median(mib for _, mib in part), 1) for name, part in parts.items()
    }
    row |= {"items": len(measured.outputs), "seconds": round(measured.seconds, 2)}
    row |= {"peak_mib": round(max(mib for _, mib in samples), 1)}
    return row


@contextmanager
def _sampled(process: psutil.Process) -> Iterator[list[tuple[float, float]]]:
    """Seconds since the beginning and MiB of a process and its children, taken by a thread while the block runs."""
    samples: list[tuple[float, float]] = []
    over, begin = threading.Event(), time.monotonic()

    def sample() -> None:
        while True:
            size = sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
            samples.append((round(time.monotonic() - begin, 2), round(size / (1 << 20), 1)))
            if over.wait(EVERY_SECONDS):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
