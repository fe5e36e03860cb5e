"""A pool's signal against a hand count, on a real server, while messages lie in lists and leases."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace

import pytest
from kombu import Queue
from redis import Redis
from redis.exceptions import RedisError

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority, Shard
from pipefleet.fleet.pools import Pool
from pipefleet.fleet.revisions import Part
from pipefleet.queues.celery import celery_app, celery_message, push_job
from pipefleet.queues.keys import ledger_keys, queue_list, queue_lists, work_key
from pipefleet_workers.fleet.scaling.decide import ScalingLimits, State, decide
from pipefleet_workers.fleet.scaling.messages import SAMPLE, Content, message_cost
from pipefleet_workers.fleet.scaling.signal import Memory, Reading, measure, read_pool
from pipefleet_workers.observe.totals import Done, WorkCount, read_done, record_done

QUEUE = "pipefleet.text-classification"
PART = Part(Pool("texts", "text-classification", "/texts"), QUEUE, (QUEUE,))
SINGLE = JobMessage(id="one", task="text-classification", items=(JobItem("0", "text"),))


def shard(count: int, cost: float = 0.0) -> JobMessage:
    place = Shard("run", "s3://b/o/", "s3://b/o/s", 0, 0, count)
    return JobMessage(id=f"shard{count}", task="text-classification", shard=place, cost=cost)


def put(redis: Redis, jobs: list[JobMessage], priority: Priority = Priority.NORMAL) -> None:
    pipe = redis.pipeline()
    for job in jobs:
        push_job(pipe, job, QUEUE, priority)
    pipe.execute()


def look(redis: Redis, workers: int = 1, now: float | None = None) -> Reading:
    return read_pool(redis, PART, workers=workers, now=now or time.time(), source=random.Random(1))


def cost(reading: Reading, state: str) -> float:
    return sum(one.count * one.mean for one in reading.contents[state].values())


@pytest.mark.parametrize("shard_seconds", [2.0, 20.0, 200.0])
def test_shards_that_last_longer_than_a_reading_are_measured_as_well(shard_seconds: float) -> None:
    memory, each = Memory(), 0.0
    waiting = {"queued": {"q": Content(100, 100.0)}, "leased": {"u": Content(1, 100.0)}, "delayed": {}}
    for tick in range(200):
        seconds = 5.0 * tick
        done = Done(100.0 * (seconds // shard_seconds), seconds)
        memory, measured = measure(memory, Reading(1e6 + seconds, waiting, done, 1))
        each = measured.seconds_per_cost or each
    assert each == pytest.approx(shard_seconds / 100, rel=0.3)
    assert Memory.from_json(memory.to_json()) == memory


def test_an_empty_queue(client: Client, redis: Redis) -> None:
    reading = look(redis)
    assert [reading.count(state) for state in ("queued", "leased", "delayed")] == [0, 0, 0]
    assert measure(Memory(), reading)[1].signal.queued == 0


def test_every_priority_and_every_lease_counts(client: Client, redis: Redis) -> None:
    put(redis, [SINGLE] * 3, Priority.HIGH)
    put(redis, [SINGLE] * 5, Priority.NORMAL)
    put(redis, [shard(16), shard(32), shard(7, cost=50.0)], Priority.LOW)
    app = celery_app(client.settings, queue=QUEUE)
    with app.connection_for_read() as connection, connection.channel() as channel:
        held = [Queue(QUEUE)(channel).get(accept=["json"]) for _ in range(4)]
        assert all(held)
        reading = look(redis)
        assert (reading.count("queued"), reading.count("leased")) == (7, 4)
        assert cost(reading, "queued") + cost(reading, "leased") == 8 + 16 + 32 + 50
        assert cost(reading, "leased") == 4  # the three urgent ones and the first of the normal ones
        for message in held:
            message.ack()
    assert (look(redis).count("queued"), look(redis).count("leased")) == (7, 0)


def test_delayed_messages_wait_and_dead_letters_do_not(redis: Redis) -> None:
    keys = ledger_keys(QUEUE)
    for tag in ("a", "b", "c"):
        envelope = json.loads(celery_message(shard(32), QUEUE, Priority.LOW))
        redis.hset(keys["unacked_key"], tag, json.dumps([envelope, "", QUEUE]))
    redis.zadd(keys["delayed_key"], {"b": time.time() + 60})
    redis.lpush(keys["dead_key"], "a dead letter")
    reading = look(redis)
    assert [reading.count(state) for state in ("queued", "leased", "delayed")] == [0, 2, 1]
    assert (cost(reading, "leased"), cost(reading, "delayed")) == (64, 32)
    signal = measure(replace(Memory(), saturated=Done(1.0, 1.0)), reading)[1].signal
    assert (signal.queued, signal.leased) == (32, 64)


def test_a_long_queue_is_counted_exactly_and_its_cost_within_the_error_it_states(redis: Redis) -> None:
    sizes = [16 << min(5, index // 400) for index in range(3000)]  # shards grow along a run
    put(redis, [shard(size) for size in sizes], Priority.LOW)
    reading = look(redis)
    _, measured = measure(Memory(), reading)
    assert reading.count("queued") == 3000
    assert 0 < measured.error < 0.2
    assert cost(reading, "queued") == pytest.approx(sum(sizes), rel=4 * measured.error)


def test_a_reading_is_bounded_however_long_the_queue(redis: Redis) -> None:
    put(redis, [shard(16)] * 2000, Priority.LOW)
    before = redis.info("commandstats")
    look(redis)
    after = redis.info("commandstats")
    calls = {
        name: after[name]["calls"] - before.get(name, {"calls": 0})["calls"]
        for name in after
        if name.startswith("cmdstat_l")
    }
    assert calls["cmdstat_lindex"] == SAMPLE + 1
    assert sum(calls.values()) == SAMPLE + 1 + 2 * len(queue_lists(QUEUE))


def test_the_oldest_message_tells_its_age_and_others_may_be_silent(redis: Redis) -> None:
    put(redis, [SINGLE, SINGLE])
    assert 0 <= look(redis).oldest_age < 60
    key = queue_list(QUEUE, Priority.NORMAL)
    envelope = json.loads(celery_message(SINGLE, QUEUE, Priority.NORMAL))
    envelope["headers"] |= {"pipefleet-at": 1000.0, "pipefleet-cost": 9.0}
    redis.rpush(key, json.dumps(envelope))
    reading = look(redis, now=1090.0)
    assert reading.oldest_age == 90
    assert cost(reading, "queued") == 2 + 9


def test_what_is_not_one_of_ours_counts_as_one(redis: Redis) -> None:
    redis.lpush(QUEUE, "no JSON", "[]", '{"headers": null}', '{"headers": {}, "properties": {}, "body": "%"}')
    reading = look(redis)
    assert (reading.count("queued"), cost(reading, "queued")) == (4, 4.0)


def test_totals_add_up_over_workers(redis: Redis) -> None:
    assert read_done(redis, "texts") == Done()
    record_done(redis, "texts", cost=3.0, seconds=0.5)
    record_done(redis, "texts", cost=4.0, seconds=0.25)
    assert read_done(redis, "texts") == Done(7.0, 0.75)
    assert redis.exists(work_key("texts"))


def test_a_worker_tells_once_what_it_did_and_keeps_what_it_could_not_tell(redis: Redis) -> None:
    count = WorkCount()
    count.add(cost=2.0)
    count.add(seconds=0.5)
    away = Redis(port=1)
    with pytest.raises(RedisError):
        count.flush(away, "texts")
    count.flush(redis, "texts")
    count.flush(redis, "texts")
    assert read_done(redis, "texts") == Done(2.0, 0.5)


@pytest.mark.parametrize("job", [SINGLE, shard(16), shard(16, cost=300.0)])
def test_both_sides_count_a_job_alike(job: JobMessage) -> None:
    assert job.work == message_cost(job.to_json())


@pytest.mark.parametrize(("payload", "expected"), [
    ({"items": [{}, {}]}, 2.0), ({"shard": {"count": 5}}, 5.0), ({"shard": {"count": 5}, "cost": 80}, 80.0), ({}, 1.0),
])  # fmt: skip
def test_cost_of_a_message(payload: dict[str, object], expected: float) -> None:
    assert message_cost(payload) == expected


def reading(now: float, count: int, done: float, *, workers: int = 2, seconds: float = 0.0) -> Reading:
    content = Content(count, 1.0)
    return Reading(now, {"queued": {QUEUE: content}, "leased": {}, "delayed": {}}, Done(done, seconds), workers)


class TestMeasure:
    def test_before_anything_is_measured_work_asks_for_one_worker_only(self) -> None:
        memory, measured = measure(Memory(), reading(0.0, 1_000_000, 0.0, workers=0))
        assert measured.seconds_per_cost is None
        assert 0 < measured.signal.queued < 1
        assert memory.seconds_per_cost is None

    def test_arrivals_follow_from_what_ended_and_what_waits(self) -> None:
        memory, _ = measure(Memory(), reading(0.0, 100, 50.0))
        memory, measured = measure(memory, reading(10.0, 130, 70.0))
        assert measured.seconds_per_cost == pytest.approx(1.0)  # two workers did 20 in 10 s while work waited
        assert measured.signal.arrived == pytest.approx(50.0)
        assert measured.signal.queued == pytest.approx(130.0)

    def test_an_idle_pool_is_not_taken_for_a_slow_one(self) -> None:
        memory, _ = measure(Memory(), reading(0.0, 0, 0.0, workers=10))
        memory, measured = measure(memory, reading(10.0, 0, 4.0, workers=10, seconds=2.0))
        assert measured.seconds_per_cost == pytest.approx(0.5)  # of the forwards alone

    def test_saturated_time_is_believed_before_forwards(self) -> None:
        memory, _ = measure(Memory(), reading(0.0, 50, 0.0, workers=2))
        memory, measured = measure(memory, reading(10.0, 50, 10.0, workers=2, seconds=1.0))
        assert measured.seconds_per_cost == pytest.approx(2.0)

    def test_it_follows_a_pool_whose_jobs_grow_fourfold(self) -> None:
        memory, now, done = Memory(), 0.0, 0.0
        for step in range(200):
            done += 20.0 if step < 100 else 5.0
            now += 10.0
            memory, measured = measure(memory, reading(now, 50, done))
        assert measured.seconds_per_cost == pytest.approx(4.0, rel=0.15)

    def test_emptied_totals_and_silence_are_no_arrivals(self) -> None:
        memory, _ = measure(Memory(), reading(0.0, 50, 1000.0))
        _, emptied = measure(memory, reading(10.0, 50, 0.0))
        assert emptied.signal.arrived == 0
        _, late = measure(memory, reading(10_000.0, 5000, 2000.0))
        assert late.signal.arrived == 0

    @pytest.mark.parametrize("wrong", [0.25, 4.0, 20.0])
    def test_a_wrong_belief_mends_itself(self, wrong: float) -> None:
        """The whole loop on a load of 20 devices, from a memory of jobs that took `wrong` seconds and now take one."""
        memory, state = Memory(saturated=Done(100.0, 100.0 * wrong)), State()
        backlog, workers, done = 0.0, int(20 * max(1.0, wrong)), 0.0
        limits = ScalingLimits(0, 1000, wait_slo=600.0)
        sizes = []
        for step in range(6 * 240):
            served = min(backlog + 20.0 * 15, workers * 15.0)
            backlog, done = backlog + 20.0 * 15 - served, done + served
            memory, measured = measure(memory, reading(15.0 * step, math.ceil(backlog), done, workers=workers))
            state, decision = decide(state, measured.signal, limits=limits)
            workers = decision.desired
            sizes.append(workers)
        assert 19 <= sum(sizes[-240:]) / 240 <= 22
        assert backlog < 20 * limits.wait_slo / 2

    def test_memory_survives_json(self) -> None:
        memory, _ = measure(Memory(), reading(0.0, 500, 10.0))
        memory, _ = measure(memory, reading(10.0, 700, 20.0, seconds=3.0))
        assert Memory.from_json(json.loads(json.dumps(memory.to_json()))) == memory
        assert memory.means == {QUEUE: 1.0}

    def test_leased_work_is_work(self) -> None:
        memory, _ = measure(Memory(), reading(0.0, 100, 50.0))
        held = replace(
            reading(10.0, 100, 70.0), contents={"queued": {}, "leased": {"h": Content(7, 2.0)}, "delayed": {}}
        )
        measured = measure(replace(memory, saturated=Done(10.0, 10.0)), held)[1]
        assert (measured.signal.queued, measured.signal.leased) == (0, 14)
