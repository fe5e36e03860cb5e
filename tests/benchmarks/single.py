"""Single jobs with the trivial model: how many a second with many in flight, and how long one takes alone."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import peer_celery
from tests.benchmarks.contenders import CELERY, SYSTEM
from tests.benchmarks.measurement import Machine, timed
from tests.benchmarks.system import System
from tests.benchmarks.workloads import Workload

IN_FLIGHT = 64
WAIT_SECONDS = 300.0
Result = Callable[[], Any]
Submit = Callable[[str], Result]
"""Sends one text and returns what waits for its output."""


def contenders(
    running: Callable[[], System], workload: Workload, machine: Machine, scratch: Path, jobs: int
) -> dict[str, Callable[[], dict[str, Any]]]:
    """pipefleet and stock Celery by name: jobs/s with 64 in flight over `jobs`, then the latency of a tenth of them alone."""
    texts = [list(workload.items.values())[index % len(workload.items)] for index in range(jobs)]
    return {
        SYSTEM: lambda: _ours(running(), workload, texts),
        CELERY: lambda: _theirs(running(), workload, machine, scratch, texts),
    }


def _ours(system: System, workload: Workload, texts: Sequence[str]) -> dict[str, Any]:
    def submit(text: str) -> Result:
        job = system.client.submit(workload.task, text)
        return lambda: job.result(WAIT_SECONDS)

    return _row(submit, texts, system.processes)


def _theirs(
    system: System, workload: Workload, machine: Machine, scratch: Path, texts: Sequence[str]
) -> dict[str, Any]:
    with peer_celery.running(workload, machine, scratch) as (worker, send):

        def submit(text: str) -> Result:
            result = send(text)
            return lambda: result.get(WAIT_SECONDS)

        return _row(submit, texts, {"worker": worker, "redis": system.processes["redis"]})


def _row(submit: Submit, texts: Sequence[str], processes: Any) -> dict[str, Any]:
    for text in texts[:IN_FLIGHT]:
        submit(text)()
    with timed(processes) as clock:
        waiting: deque[Result] = deque()
        for text in texts:
            if len(waiting) == IN_FLIGHT:
                waiting.popleft()()
            waiting.append(submit(text))
        for result in waiting:
            result()
    latencies = sorted(_latency(submit, text) for text in texts[: max(50, len(texts) // 10)])
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "jobs": len(texts),
        "jobs_per_second": round(len(texts) / clock.seconds, 2),
        "cpu_us_per_job": {name: round(1e6 * value / len(texts), 1) for name, value in clock.cpu.items()},
        "latency_p50_ms": round(1e3 * cuts[49], 3),
        "latency_p99_ms": round(1e3 * cuts[98], 3),
    }


def _latency(submit: Submit, text: str) -> float:
    begin = time.perf_counter()
    submit(text)()
    return time.perf_counter() - begin
