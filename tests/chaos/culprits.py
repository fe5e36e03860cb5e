"""Jobs that kill their worker or hang in it: the culprit ends as failed, and nobody else does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipefleet.errors import JobFailedError
from pipefleet.jobs.job import Job
from pipefleet.queues import dead_letters
from tests.chaos.checks import check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import QUEUE, World

PATIENCE = 300.0
CODE = "killed_worker"


def shard_with(world: World, bad: dict[int, str], *, workers: int = 2, **settings: Any) -> Finding:
    """A shard of 200 with bad items, innocent shards and single jobs beside it."""
    with world.scene(workers=workers, **settings) as client:
        rows = texts(200)
        for place, text in bad.items():
            rows[place] = text
        began = time.monotonic()
        run = start_run(client, rows, shard_size=200)
        beside = start_run(client, innocent := texts(400, "innocent"), shard_size=20)
        jobs = [client.submit(TASK, text) for text in texts(150, "single")]
        check_singles(jobs, PATIENCE)
        beside.wait(timeout=PATIENCE)
        run.wait(timeout=PATIENCE)
        recovery = time.monotonic() - began
        check_run(client, beside, innocent)
        check_run(client, run, rows, dict.fromkeys(bad, CODE))
        check_quiet(world, dead=len(bad))
        check_letters(world, len(bad))
        codes = Counter(code for worker in world.workers for code in worker.codes)
        most = 6 * len(bad)
        assert sum(codes.values()) <= most, f"{sum(codes.values())} workers died instead of {most} at most"
    return Finding(recovery, f"from the start; workers died {sum(codes.values())} times, codes {sorted(codes)}")


def check_letters(world: World, count: int) -> None:
    letters = dead_letters.dead_letters(world.redis, QUEUE)
    assert len(letters) == count
    assert all(letter.reason and letter.job_id for letter in letters), f"letters without a reason: {letters}"


@scenario("poison-item")
def poison_item(world: World, scale: Scale) -> Finding:
    """An item whose forward kills the process, in a shard of 200."""
    return shard_with(world, {77: "KILL"})


@scenario("poison-items")
def poison_items(world: World, scale: Scale) -> Finding:
    """Two of them in one shard."""
    return shard_with(world, {3: "KILL one", 190: "KILL two"})


@scenario("hanging-item")
def hanging_item(world: World, scale: Scale) -> Finding:
    """An item whose forward never returns: the watchdog ends the process with code 70 each time."""
    finding = shard_with(world, {120: "HANG"}, forward_timeout=2)
    assert "70" in finding.note, finding.note
    return finding


@scenario("hanging-decode")
def hanging_decode(world: World, scale: Scale) -> Finding:
    """An item that is never decoded: the watchdog ends the process with code 72 each time."""
    finding = shard_with(world, {60: "LOOP"}, stage_timeout=2)
    assert "72" in finding.note, finding.note
    return finding


@scenario("poison-job")
def poison_job(world: World, scale: Scale) -> Finding:
    """Single jobs that kill their worker, among many that do not, on one worker that holds them all."""
    with world.scene(workers=1) as client:
        before = [client.submit(TASK, text) for text in texts(scale.jobs, "before")]
        began = time.monotonic()
        bad = [client.submit(TASK, f"KILL {index}") for index in range(2)]
        after = [client.submit(TASK, text) for text in texts(scale.jobs, "after")]
        beside = start_run(client, rows := texts(200, "beside"), shard_size=20)
        codes = failure_codes(bad)
        recovery = time.monotonic() - began
        check_singles([*before, *after], PATIENCE)
        beside.wait(timeout=PATIENCE)
        check_run(client, beside, rows)
        assert codes == [CODE] * 2, f"the bad jobs failed with {codes}"
        check_quiet(world, dead=2)
        check_letters(world, 2)
        deaths = len(world.workers[0].codes)
    return Finding(recovery, f"until both had failed; the worker died {deaths} times")


def failure_codes(jobs: Sequence[Job]) -> list[str]:
    """The codes that jobs failed with; of one that did not fail, what it became."""
    codes = []
    for job in jobs:
        try:
            job.result(timeout=PATIENCE)
            codes.append("succeeded")
        except JobFailedError as error:
            codes.append(error.failure_code)
    return codes
