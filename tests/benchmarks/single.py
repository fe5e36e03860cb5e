"""Single jobs with the trivial model: how many a second with many in flight, and how long one takes alone."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import peer_celery
from tests.benchmarks.measurement import Machine, timed
from tests.benchmarks.system import System
from tests.benchmarks.workloads import Workload

IN_FLIGHT = 64
WAIT_SECONDS = 300.0
Result = Callable[[], Any]
Submit = Callable[[str], Result]
"""Sends one text and returns what waits for its output."""


def measure(system: System, workload: Workload, machine: Machine, scratch: Path, jobs: int) -> dict[str, Any]:
    """A row for pipefleet and one for stock Celery: jobs/s with 64 in flight over `jobs`, latency of a tenth of them."""
    texts = [list(workload.items.values())[index % len(workload.items)] for index in range(jobs)]

    def ours(text: str) -> Result:
        job = system.client.submit(workload.task, text)
        return lambda: job.result(WAIT_SECONDS)

    table = {"pipefleet": _row(ours, texts, system.processes)}
    with peer_celery.running(workload, machine, scratch) as (worker, submit):

        def theirs(text: str) -> Result:
            result = submit(text)
            return lambda: result.get(WAIT_SECONDS)

        table[peer_celery.NAME] = _row(theirs, texts, {"worker": worker})
    _print(table)
    return table


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
        "jobs_per_second": len(texts) / clock.seconds,
        "cpu_us_per_job": {name: round(1e6 * value / len(texts), 1) for name, value in clock.cpu.items()},
        "latency_p50_ms": 1e3 * cuts[49],
        "latency_p99_ms": 1e3 * cuts[98],
    }


def _latency(submit: Submit, text: str) -> float:
    begin = time.perf_counter()
    submit(text)()
    return time.perf_counter() - begin


def _print(table: dict[str, dict[str, Any]]) -> None:
    for name, row in table.items():
        cpu = ", ".join(f"{process} {value:.0f}" for process, value in row["cpu_us_per_job"].items())
        print(
            f"  {name:24} {row['jobs_per_second']:7.0f} jobs/s with {IN_FLIGHT} in flight; one in flight: "
            f"p50 {row['latency_p50_ms']:.2f} ms, p99 {row['latency_p99_ms']:.2f} ms; CPU µs: {cpu}",
            flush=True,
        )
