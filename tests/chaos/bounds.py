"""More work than a worker holds: shards beyond its budget, and results that together are far above its memory."""

from __future__ import annotations

import re
import time
from pathlib import Path

from tests.chaos.checks import check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import World, until

PATIENCE = 300.0
MB = 1 << 20
BUDGET = 5
"""How many results the bytes that a worker may hold are."""
BESIDE = 12
"""How many results a worker may grow by beside its budget: what four threads encode, and what the allocator keeps."""


@scenario("budget-exhausted")
def budget_exhausted(world: World, scale: Scale) -> Finding:
    """Shards of many times the items that a worker takes in, one behind the other, a worker killed on the way."""
    with world.scene(workers=2, in_flight_items=50) as client:
        began = time.monotonic()
        first = start_run(client, rows := texts(1500), shard_size=750)
        second = start_run(client, more := texts(500, "more"), shard_size=500)
        world.order_death("postprocess")
        jobs = [client.submit(TASK, text) for text in texts(50, "single")]
        until(lambda: world.died_at("postprocess"), what="a worker dies")
        check_singles(jobs, PATIENCE)
        for run in (first, second):
            run.wait(timeout=PATIENCE)
        took = time.monotonic() - began
        check_run(client, first, rows)
        check_run(client, second, more)
        check_quiet(world)
    return Finding(note=f"2000 items in {took:.1f} s, 50 inside at once")


@scenario("large-results")
def large_results(world: World, scale: Scale) -> Finding:
    """One shard whose results are many times the budget of the worker; its memory stays within it."""
    each, count = scale.megabytes, scale.results
    with world.scene(workers=1, in_flight_bytes=BUDGET * each * MB, store_threads=4) as client:
        (worker,) = world.workers
        start = _peak(worker.pid)
        rows = [f"LARGE:{each} {text}" for text in texts(count)]
        began = time.monotonic()
        run = start_run(client, rows, shard_size=count)
        run.wait(timeout=PATIENCE)
        took, grown = time.monotonic() - began, _peak(worker.pid) - start
        check_run(client, run, rows)
        check_quiet(world)
        assert not worker.codes, f"the worker ended with {worker.codes}"
        assert grown <= (BUDGET + BESIDE) * each, f"the worker grew by {grown} MB over {count} results of {each} MB"
    return Finding(note=f"{count} results of {each} MB in {took:.1f} s, the worker grew by {grown} MB")


def _peak(pid: int) -> int:
    """The most megabytes that a process has had so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024
