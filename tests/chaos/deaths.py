"""Workers and clients that die: in every stage, under load, twice with the same job, on request."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import Priority
from pipefleet.contract.shards import shard_message
from pipefleet.queues.keys import queue_list
from pipefleet.queues.looking import queue_depth, queued_ids
from pipefleet.queues.revision_notes import queues_of
from pipefleet_workers.fleet.local.environment import in_environment
from tests.chaos.checks import check_queues, check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.saboteur import POINTS, TASK
from tests.chaos.scenario import SCENARIOS, Finding, Scale, scenario
from tests.chaos.world import QUEUE, World, until

PATIENCE = 90.0
"""Seconds within which everything must be well again; three times what is promised by default."""


def killed_at(point: str) -> None:
    """Register the scenario of a worker that dies at a point, with a shard and single jobs in its hands."""

    @scenario(f"killed-{point}")
    def play(world: World, scale: Scale) -> Finding:
        with world.scene(workers=2) as client:
            for index in range(8):
                client.store.put(f"s3://pipefleet/chaos/in/{index}.txt", f"object {index}".encode())
            rows = [
                f"s3://pipefleet/chaos/in/{n % 8}.txt" if n % 10 == 0 else text for n, text in enumerate(texts(400))
            ]
            world.order_death(point)
            jobs = [client.submit(TASK, text) for text in texts(40, "single")]
            run = start_run(client, rows, shard_size=50)
            until(lambda: world.died_at(point), what=f"a worker dies at {point}")
            died = time.monotonic()
            check_singles(jobs, PATIENCE)
            run.wait(timeout=PATIENCE)
            recovery = time.monotonic() - died
            check_run(client, run, rows)
            check_quiet(world)
        return Finding(recovery)


for _point in POINTS:
    killed_at(_point)


@scenario("killed-together")
def killed_together(world: World, scale: Scale) -> Finding:
    """Every worker is killed at once, under load."""
    with world.scene(workers=2) as client:
        rows = texts(scale.jobs * 4)
        jobs = [client.submit(TASK, text) for text in texts(scale.jobs, "single")]
        run = start_run(client, rows, shard_size=50)
        until(lambda: len(world.ran) > 100, what="work has begun")
        for worker in world.workers:
            worker.send(signal.SIGKILL)
        died = time.monotonic()
        check_singles(jobs, PATIENCE)
        run.wait(timeout=PATIENCE)
        recovery = time.monotonic() - died
        check_run(client, run, rows)
        check_quiet(world)
    return Finding(recovery)


CLIENT = """
import sys, pipefleet
client = pipefleet.Client()
print(client.submit("text-classification", "once", idempotency_key=sys.argv[3]).id, flush=True)
run = client.map("text-classification", sys.argv[1], output=sys.argv[2], shard_size=20)
print("started", flush=True)
run.wait()
"""


@scenario("killed-client")
def killed_client(world: World, scale: Scale) -> Finding:
    """A client dies while it plans a run; another one resumes it, and the idempotency key finds the first one's job."""
    with world.scene(workers=2) as client:
        count = min(scale.items, 6000)
        source, output = "s3://pipefleet/chaos/client/m.jsonl", f"s3://pipefleet/chaos/client-{time.time_ns()}/"
        client.store.put(source, "".join(f'{{"inputs": "text {index}"}}\n' for index in range(count)).encode())
        with in_environment({"PIPEFLEET_OUTSTANDING_SHARDS": "5"}):
            child = subprocess.Popen(
                [sys.executable, "-c", CLIENT, source, output, output], stdout=subprocess.PIPE, text=True
            )
        assert child.stdout is not None
        first = child.stdout.readline().strip()
        until(lambda: next(iter(client.store.list(RunLayout.at(output).parts)), None), what="a part is written")
        child.kill()
        child.wait()
        died = time.monotonic()
        run = client.run(output)
        assert run.plan.shards is None, "the client had planned everything already"
        job = client.submit(TASK, "once", idempotency_key=output)
        assert job.id == first, "the idempotency key made a second job"
        run.resume()
        run.wait(timeout=PATIENCE + count / 50)
        recovery = time.monotonic() - died
        check_run(client, run, range(count))
        check_singles([job])
        check_quiet(world)
    assert world_ran(world)["once"] == 1
    return Finding(recovery, "until the run has ended; a planner counts as alive for 10 s")


def world_ran(world: World) -> Counter[str]:
    """How often each text was forwarded."""
    return Counter(world.ran)


@scenario("given-twice")
def given_twice(world: World, scale: Scale) -> Finding:
    """The same jobs are queued twice with other tags, so that two workers have each of them at the same time."""
    with world.scene(workers=0) as client:
        rows = texts(200)
        run = start_run(client, rows, shard_size=20)
        jobs = [client.submit(TASK, text) for text in texts(60, "single")]
        run.join_planner()
        layout = RunLayout.at(run.uri)
        client.publish([shard_message(run.plan, layout, n, 20 * n, 20) for n in range(10)], QUEUE, Priority.LOW)
        _queue_again(world, client)
        for _ in range(2):
            world.add_worker(shards=4)
        world.wait_ready()
        run.wait(timeout=PATIENCE)
        check_singles(jobs)
        parts = {entry.key: entry.etag for entry in client.store.list(layout.parts)}
        check_quiet(world)
        check_run(client, run, rows)
        assert parts == {entry.key: entry.etag for entry in client.store.list(layout.parts)}, "a part was written again"
    return Finding(note=f"{len(world.ran)} forwards of 260 items")


def _queue_again(world: World, client: Client) -> None:
    for name in (queue_list(queue, Priority.NORMAL) for queue in queues_of(world.redis, QUEUE)):
        _queue_list_again(world, name)


def _queue_list_again(world: World, name: str) -> None:
    for raw in world.redis.lrange(name, 0, -1):
        message = json.loads(raw)
        message["properties"]["delivery_tag"] += "-again"
        world.redis.lpush(name, json.dumps(message))


@scenario("two-writers")
def two_writers(world: World, scale: Scale) -> Finding:
    """The result of a job that two workers run at once is one object, and stays the one that the record tells of."""
    with world.scene(workers=0) as client:
        jobs = [client.submit(TASK, f"SLOW:2 writer {index}", parameters={"top_k": None}) for index in range(4)]
        _queue_again(world, client)
        with in_environment({"PIPEFLEET_INLINE_BYTES": "0"}):  # every result is an object
            for _ in range(2):
                world.add_worker(prefetch=4)
        world.wait_ready()
        first = {}
        for job in jobs:
            job.result(timeout=PATIENCE)
            first[job.id] = _etag(client, job)
        check_quiet(world)
        assert len(world.ran) == 8, "no job was with two workers"
        assert first == {job.id: _etag(client, job) for job in jobs}, "a result was written over"
    return Finding(note=f"{len(world.ran)} forwards of 4 jobs")


def _etag(client: Client, job: object) -> tuple[str | None, float]:
    record = job.record()  # type: ignore[attr-defined]
    found = client.store.client.head_object(Bucket=record.output_ref.bucket, Key=record.output_ref.key)
    assert record.output_ref.size in (None, found["ContentLength"]), "the record tells of another object"
    return found["ETag"], found["LastModified"].timestamp()


@scenario("terminated")
def terminated(world: World, scale: Scale) -> Finding:
    """SIGTERM under load: started work is finished, the rest goes back, nothing is run twice, and the exit code is 0."""
    with world.scene(workers=2, drain_seconds=10, simulated_device="0.05,0") as client:
        rows = texts(scale.jobs * 4)
        jobs = [client.submit(TASK, text) for text in texts(scale.jobs, "single")]
        run = start_run(client, rows, shard_size=10)
        until(lambda: len(world.ran) > 100, what="work has begun")
        first = world.workers[0]
        first.supervised = False
        first.send(signal.SIGTERM)
        asked = time.monotonic()
        until(lambda: first.codes, 30, what="the worker ends")
        ended = time.monotonic() - asked
        check_singles(jobs, PATIENCE)
        run.wait(timeout=PATIENCE)
        check_run(client, run, rows)
        check_quiet(world)
        assert first.codes == [0], f"exit codes {first.codes}"
        twice = [text for text, times in world_ran(world).items() if times > 1]
        assert not twice, f"{len(twice)} texts were forwarded twice, such as {twice[:3]}"
    return Finding(ended, "until the process had ended; nothing forwarded twice")


@scenario("terminated-long")
def terminated_long(world: World, scale: Scale) -> Finding:
    """SIGTERM while a forward takes longer than the drain: the job goes back at once and runs elsewhere."""
    with world.scene(workers=1, drain_seconds=1) as client:
        job = client.submit(TASK, "SLOW:6 forward")
        until(lambda: world.ran, what="the forward has begun")
        first = world.workers[0]
        first.supervised = False
        second = world.add_worker()
        until(lambda: second.ready, 60, what="another worker is ready")
        first.send(signal.SIGTERM)
        asked = time.monotonic()
        until(lambda: len(world.ran) == 2, 30, what="the job runs elsewhere")
        recovery = time.monotonic() - asked
        until(lambda: first.codes, 30, what="the worker ends")
        check_singles([job])
        check_quiet(world)
        assert first.codes == [0], f"exit codes {first.codes}"
    return Finding(recovery, "until it ran elsewhere")


@scenario("told-to-shut-down")
def told_to_shut_down(world: World, scale: Scale) -> Finding:
    """`celery control shutdown` is a SIGTERM: what runs is finished, what waits goes back at once."""
    with world.scene(workers=1, prefetch=8) as client:
        jobs = [client.submit(TASK, f"SLOW:0.3 {index}") for index in range(20)]
        until(lambda: world.ran, what="work has begun")
        first = world.workers[0]
        first.supervised = False
        world.events.app.control.shutdown()
        asked = time.monotonic()
        until(lambda: first.codes, 30, what="the worker ends")
        ended = time.monotonic() - asked
        found = queue_depth(world.redis, QUEUE)
        assert (found["unacked"], first.codes) == (0, [0]), f"{found}, exit codes {first.codes}"
        world.add_worker()
        check_singles(jobs, PATIENCE)
        check_quiet(world)
        assert max(world_ran(world).values()) == 1, "something was forwarded twice"
    return Finding(ended, "until the process had ended; nothing was left with it")


@scenario("terminated-twice")
def terminated_twice(world: World, scale: Scale) -> Finding:
    """A second SIGTERM ends the waiting."""
    with world.scene(workers=1, drain_seconds=60) as client:
        job = client.submit(TASK, "SLOW:16 forward")
        until(lambda: world.ran, what="the forward has begun")
        first = world.workers[0]
        first.supervised = False
        first.send(signal.SIGTERM)
        time.sleep(0.5)
        first.send(signal.SIGTERM)
        asked = time.monotonic()
        until(lambda: first.codes, 30, what="the worker ends")
        ended = time.monotonic() - asked
        assert ended < 14.0, "it waited for the forward"
        assert list(queued_ids(world.redis, QUEUE)) == [job.id], "the job is lost"
        assert job.cancel()
        world.add_worker()
        check_quiet(world, seconds=60)
    return Finding(ended, f"until the process had ended, with code {first.codes[0]}")


def long_job(world: World, scale: Scale) -> Finding:
    """A job that takes many times its lease runs once, beside a worker that would take it."""
    with world.scene(workers=2, lease_seconds=scale.long_lease, prefetch=1) as client:
        job = client.submit(TASK, f"SLOW:{scale.long_seconds} job")
        run = start_run(client, [f"SLOW:{scale.long_seconds} item", "other"])
        check_singles([job], PATIENCE + 2 * scale.long_seconds)
        run.wait(timeout=PATIENCE + scale.long_seconds)
        check_run(client, run, ["", ""])
        check_quiet(world)
        counts = world_ran(world)
        assert all(times == 1 for times in counts.values()), f"run more than once: {counts}"
    return Finding(note=f"{scale.long_seconds:.0f} s under a lease of {scale.long_lease:.0f} s, run once")


SCENARIOS["long-job"] = long_job


@scenario("frozen-worker")
def frozen_worker(world: World, scale: Scale) -> Finding:
    """A worker stops for longer than its lease and goes on: its jobs have run elsewhere, its own results change nothing."""
    with world.scene(workers=2) as client:
        rows = [*(f"SLOW:0.05 {text}" for text in texts(40)), *texts(200)]
        run = start_run(client, rows, shard_size=20)
        jobs = [client.submit(TASK, text) for text in texts(50, "single")]
        until(lambda: len(world.ran) > 10, what="work has begun")
        frozen = world.workers[0]
        frozen.send(signal.SIGSTOP)
        stopped = time.monotonic()
        check_singles(jobs, PATIENCE)
        run.wait(timeout=PATIENCE)
        recovery = time.monotonic() - stopped
        parts = {entry.key: entry.etag for entry in client.store.list(RunLayout.at(run.uri).parts)}
        frozen.send(signal.SIGCONT)
        check_quiet(world)
        check_run(client, run, rows)
        assert parts == {entry.key: entry.etag for entry in client.store.list(RunLayout.at(run.uri).parts)}
    return Finding(recovery)


@scenario("skewed-clocks")
def skewed_clocks(world: World, scale: Scale) -> Finding:
    """Workers whose clocks are an hour early and an hour late: leases, deadlines and records go by the server's clock."""
    with world.scene(workers=0) as client:
        for hours in (-1, 1):
            world.add_worker(clock=3600 * hours)
        world.wait_ready()
        rows = texts(400)
        jobs = [client.submit(TASK, text, expires=2 * PATIENCE) for text in texts(60, "single")]
        run = start_run(client, rows, shard_size=20)
        check_singles(jobs)
        for record in (job.record() for job in jobs):
            times = [one or 0.0 for one in (record.submitted, record.started, record.finished)]
            assert times == sorted(times), f"submitted, started and finished are {times}"
            assert times[2] - times[0] < PATIENCE, f"{times[2] - times[0]:.0f} s between submitted and finished"
        run.wait(timeout=PATIENCE)
        check_run(client, run, rows)
        check_quiet(world)
        check_queues(world)
        twice = [text for text, times in world_ran(world).items() if times > 1]
        assert not twice, f"{len(twice)} texts were forwarded twice"
    return Finding(note="-1 h and +1 h: nothing expired, nothing run twice")
