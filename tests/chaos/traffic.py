"""Hostile messages, deep queues, cancelling and expiry under load."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
import uuid
from typing import Any

from pipefleet.contract.messages import JobItem, JobMessage, JobState, Priority
from pipefleet.contract.shards import shard_id
from pipefleet.errors import JobCancelledError, JobExpiredError
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import celery_message
from pipefleet.queues.keys import queue_lists
from pipefleet.queues.looking import queue_depth, queued_ids
from pipefleet.queues.revision_notes import queues_of
from pipefleet_workers.ending import REVOKED
from pipefleet_workers.fleet.local.environment import in_environment
from tests.chaos.checks import check_queues, check_quiet, check_run, check_singles, start_run, texts
from tests.chaos.saboteur import TASK
from tests.chaos.scenario import Finding, Scale, scenario
from tests.chaos.world import QUEUE, World, until

PATIENCE = 180.0


def hostile(random_: random.Random) -> str:
    """One message that no worker can run: no JSON, no envelope, a wrong body, a wrong job."""
    good = json.loads(celery_message(job(), QUEUE, Priority.NORMAL))
    kind = random_.randrange(12)
    if kind == 0:
        return random_.randbytes(random_.randrange(200)).decode("latin-1")
    if kind == 1:
        return json.dumps(random_.choice([None, 1, [], {}, "text", {"body": 1}, [[[]]]]))
    if kind == 2:
        return "[" * 5000
    if kind == 3:
        good["properties"].pop(random_.choice(["delivery_tag", "delivery_info"]))
    elif kind == 4:
        good["headers"] = random_.choice([None, [], {}, "x", {"task": "no.such.task", "id": "x"}])
    elif kind == 5:
        good["body"] = random_.choice(["", "[", "null", "{}", "[1]", "[[], {}]", "[[1,2,3], {}, {}]", 5, None])
    elif kind == 6:
        good["content-type"] = random_.choice(["application/x-python-serialize", "application/x-yaml", "", None, 7])
    elif kind == 7:
        good["headers"].update(random_.choice([{"eta": "x"}, {"expires": "y"}, {"retries": "z"}, {"timelimit": 3}]))
    else:
        body = json.loads(good["body"])
        body[0][0] = wrong_job(random_)
        good["body"] = json.dumps(body)
    good.get("properties", {})["priority"] = random_.choice([0, 3, 9, "x", None, 10**9, -1, [], True])
    return json.dumps(good)


def job() -> JobMessage:
    return JobMessage(uuid.uuid4().hex, TASK, items=(JobItem("0", "a text"),))


def wrong_job(random_: random.Random) -> Any:
    """The payload of a job with one thing wrong."""
    value = job().to_json()
    wrong: list[tuple[str, Any]] = [
        ("version", 99), ("version", True), ("id", ""), ("id", 5), ("id", "x" * 300), ("task", "translation"), ("task", 3),
        ("model", "other/model"), ("parameters", {"evil": 1}), ("parameters", []), ("items", []), ("items", [{}]),
        ("items", [{"id": "0", "inputs": {"uri": "file:///etc/passwd"}}]), ("items", [{"id": "0", "inputs": 7}]),
        ("items", [{"id": "0", "inputs": {"text": ["x"]}}]), ("deadline", 1.0), ("deadline", -1), ("cost", "much"),
        ("output", "s3://no-such-bucket/x"), ("output", "file:///tmp/x"), ("shard", {"run_id": 1}), ("unknown", 1),
        ("reply", 3), ("items", [{"id": "0", "inputs": "s3://pipefleet/../x"}]),
        ("items", [{"id": "0", "inputs": "a", "parameters": {"function_to_apply": "evil"}}]),
    ]  # fmt: skip
    name, what = random_.choice(wrong)
    if name == "shard":
        value.pop("items")
    return {**value, name: what}


@scenario("hostile")
def hostile_messages(world: World, scale: Scale) -> Finding:
    """Thousands of malformed and hostile messages among good jobs: these succeed, and the worker is never ended."""
    with world.scene(workers=1) as client:
        random_ = random.Random(world.seed)
        began = time.monotonic()
        good = []
        lists = [name for queue in queues_of(world.redis, QUEUE) for name in queue_lists(queue)]
        for _ in range(10):
            for step in lists:
                batch = [hostile(random_) for _ in range(scale.messages // (10 * len(lists)))]
                world.redis.lpush(step, *(text.encode("utf-8", "replace") for text in batch))
            good += [client.submit(TASK, text) for text in texts(5, uuid.uuid4().hex)]
        check_singles(good, PATIENCE)
        until(lambda: not list(queued_ids(world.redis, QUEUE)), PATIENCE, what="the queue is empty")
        seconds = time.monotonic() - began
        until(lambda: not _unended(world), what="everything has ended")
        worker = world.workers[0]
        assert not worker.codes, f"the worker ended with {worker.codes}"
        letters = dead_letters.count_dead_letters(world.redis, QUEUE)
        assert letters > scale.messages // 3
        check_quiet(world, dead=letters)
    return Finding(note=f"{scale.messages} messages in {seconds:.1f} s, {letters} of them dead letters")


def _unended(world: World) -> bool:
    return any(queue_depth(world.redis, QUEUE).values())


@scenario("back-pressure")
def back_pressure(world: World, scale: Scale) -> Finding:
    """A planner keeps no more shards queued than it may."""
    deepest = 0
    with in_environment({"PIPEFLEET_OUTSTANDING_SHARDS": "4"}), world.scene(workers=1) as client:
        rows = texts(600)
        run = start_run(client, rows, shard_size=20)

        def ended() -> bool:
            nonlocal deepest
            deepest = max(deepest, sum(1 for _ in queued_ids(world.redis, QUEUE)))
            return run.progress().ended

        until(ended, PATIENCE, what="the run ends")
        check_run(client, run, rows)
        check_quiet(world)
    assert deepest <= 5, f"{deepest} shards were queued"
    return Finding(note=f"at most {deepest} shards queued with a bound of 4")


@scenario("priorities")
def priorities(world: World, scale: Scale) -> Finding:
    """An interactive job passes a deep bulk queue."""
    with world.scene(workers=1, simulated_device="0.02,0") as client:
        rows = texts(4000)
        run = start_run(client, rows, shard_size=50)
        until(lambda: len(world.ran) > 100, what="work has begun")
        begin = time.monotonic()
        check_singles([client.submit(TASK, "interactive", priority="high")])
        waited = time.monotonic() - begin
        assert not run.progress().ended, "the bulk run was over before"
        run.wait(timeout=PATIENCE)
        check_run(client, run, rows)
        check_quiet(world)
    return Finding(note=f"answered in {waited:.2f} s with the bulk run under way")


@scenario("cancel-and-expiry")
def cancel_and_expiry(world: World, scale: Scale) -> Finding:
    """Jobs and runs are cancelled and expire under load: each has one final state, and later work goes on."""
    with world.scene(workers=2, simulated_device="0.05,0") as client:
        rows = texts(4000)
        run = start_run(client, rows, shard_size=50)
        until(lambda: len(world.ran) > 50, what="work has begun")
        short = [client.submit(TASK, text, expires=0.05, priority="low") for text in texts(30, "expires")]
        cancelled = [client.submit(TASK, text) for text in texts(30, "cancelled")]
        ended = [one.cancel() for one in cancelled]
        kept = [client.submit(TASK, text) for text in texts(30, "kept")]
        begin = time.monotonic()
        run.cancel()
        states = [state_of(one) for one in [*short, *cancelled]]
        assert set(states[:30]) <= {JobState.EXPIRED, JobState.SUCCEEDED}, states
        assert all(state is JobState.CANCELLED for state, was in zip(states[30:], ended, strict=True) if was)
        check_singles(kept)
        until(lambda: not _unended(world), what="the cancelled run leaves the queue")
        seconds = time.monotonic() - begin
        check_quiet(world)
        run.join_planner()
        again = client.run(run.uri)
        again.resume()
        again.wait(timeout=PATIENCE)
        check_run(client, again, rows)
        check_quiet(world)
    return Finding(seconds, f"until the cancelled run had left; {states.count(JobState.EXPIRED)} of 30 expired")


def state_of(one: Any) -> JobState:
    with contextlib.suppress(JobCancelledError, JobExpiredError):
        one.result(timeout=60)
    state: JobState = one.status()
    return state


@scenario("revoke")
def revoke(world: World, scale: Scale) -> Finding:
    """An operator revokes what waits, what is held and what runs: jobs end as cancelled, a shard as a dead letter."""
    with world.scene(workers=1, prefetch=4, shards=1, simulated_device="0.02,0") as client:
        control = world.events.app.control
        runs = client.submit(TASK, "SLOW:3 runs")
        until(lambda: world.ran, what="a job runs")
        jobs = [runs, *(client.submit(TASK, text) for text in texts(20, "waits"))]
        shards = client.map(TASK, [{"id": str(n), "inputs": "SLOW:1"} for n in range(4)], shard_size=1,
                            output="s3://pipefleet/chaos/revoked/")  # fmt: skip
        shards.join_planner()
        begin = time.monotonic()
        control.revoke([job.id for job in jobs[1:]])
        control.revoke(runs.id, terminate=True, signal="SIGKILL")
        control.revoke([shard_id(shards.id, n) for n in range(4)], terminate=True)
        states = [state_of(one) for one in jobs]
        seconds = time.monotonic() - begin
        assert set(states) == {JobState.CANCELLED}, states
        assert {one.record().failure.message for one in jobs} == {REVOKED}
        check_singles([client.submit(TASK, text) for text in texts(10, "after")])
        check_quiet(world, dead=4)
        assert {letter.reason for letter in dead_letters.dead_letters(world.redis, QUEUE)} == {REVOKED}
        assert not world.workers[0].codes, "the worker died of it"
    return Finding(seconds, "until 21 jobs had ended as cancelled; 4 shards are dead letters")


@scenario("queues-agree")
def queues_agree(world: World, scale: Scale) -> Finding:
    """What `pipefleet queues` says of a worker that stands still in the middle of its work."""
    with world.scene(workers=1, prefetch=20, shards=2) as client:
        jobs = [client.submit(TASK, f"SLOW:0.05 {n}", priority=("low", "normal", "high")[n % 3]) for n in range(90)]
        run = start_run(client, rows := texts(200), shard_size=10)
        run.join_planner()
        world.redis.lpush(QUEUE, "hostile")
        until(lambda: len(world.ran) > 3, what="work has begun")
        world.workers[0].send(signal.SIGSTOP)
        found = dict(queue_depth(world.redis, QUEUE))
        check_queues(world)
        assert found["unacked"] > 0, found
        assert found["low"] > 0, found
        world.workers[0].send(signal.SIGCONT)
        check_singles(jobs, PATIENCE)
        run.wait(timeout=PATIENCE)
        check_run(client, run, rows)
        check_quiet(world, dead=1)
    return Finding(note=f"as it stood: {found}")
