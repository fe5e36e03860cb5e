"""What is said of a queue that nobody serves, from what workers and the scaler leave in Redis."""

from __future__ import annotations

import json
from typing import Any

import pytest
from redis import Redis

from pipefleet import broker
from pipefleet.contract import JobMessage, Priority
from pipefleet.waiting import SCALER_KEY, WORKERS_KEY, why_waiting

TASK = "text-classification"
QUEUE = f"pipefleet.{TASK}"
NAMED = f"{QUEUE}.reviews"


def now(redis: Redis) -> float:
    seconds, micros = redis.time()  # type: ignore[misc]
    return float(seconds) + micros / 1e6


def announce(redis: Redis, pool: str, *, seconds: float, queue: str = QUEUE, **facts: Any) -> None:
    """A worker of `pool` whose entry ends in `seconds`, and its pool."""
    until = now(redis) + seconds
    fields = {"task": TASK, "model": "org/a", "revision": "1", "queue": queue}
    redis.hset(broker.POOLS_KEY, pool, json.dumps({"pool": fields, "until": until}))
    redis.hset(WORKERS_KEY, f"{pool}@host-1", json.dumps({"pool": pool, "until": until, **facts}))


def test_a_queue_with_a_live_worker_needs_no_word(redis: Redis) -> None:
    announce(redis, "texts", seconds=60)
    assert why_waiting(redis, QUEUE) is None


def test_a_worker_that_was_lost_is_told_with_its_pool_model_and_what_waits(redis: Redis) -> None:
    announce(redis, "texts", seconds=-1)
    for number in range(2):
        broker.push(redis, JobMessage(f"j{number}", TASK), QUEUE, Priority.NORMAL)
    assert why_waiting(redis, QUEUE) == (
        f"no worker serves {QUEUE} (model org/a@1) now; start one with `pipefleet worker --pool texts`; 2 jobs wait"
    )


@pytest.mark.parametrize(("queue", "start"), [(QUEUE, "`pipefleet up`"), (NAMED, "`pipefleet worker --pool reviews`")])
def test_of_a_queue_that_nobody_ever_served_the_name_is_told(redis: Redis, queue: str, start: str) -> None:
    assert why_waiting(redis, queue) == f"no worker serves {queue} now; start one with {start}; 0 jobs wait"


def test_a_worker_of_another_queue_does_not_count(redis: Redis) -> None:
    announce(redis, "texts", seconds=60)
    assert why_waiting(redis, NAMED) is not None


def test_a_worker_may_name_its_queues_itself(redis: Redis) -> None:
    announce(redis, "texts", seconds=60, queues=[QUEUE, f"{QUEUE}@0a1b2c3d"])
    assert why_waiting(redis, f"{QUEUE}@0a1b2c3d") is None
    assert why_waiting(redis, f"{QUEUE}@ffffffff") is not None


@pytest.mark.parametrize(("workers", "age", "said"), [(1, 5, True), (0, 5, False), (1, 1000, False)])
def test_a_worker_that_the_scaler_wants_is_on_its_way(redis: Redis, workers: int, age: float, said: bool) -> None:
    state = {"state": {"workers": workers, "at": now(redis) - age}}
    redis.set(f"{SCALER_KEY}reviews", json.dumps(state))
    assert ("the scaler has asked for one" in str(why_waiting(redis, NAMED))) is said


def test_entries_that_are_not_ours_are_passed_over(redis: Redis) -> None:
    redis.hset(WORKERS_KEY, mapping={"a": "no json", "b": "[]", "c": '{"until": "soon"}', "d": '{"until": 9e12}'})
    redis.hset(broker.POOLS_KEY, mapping={"a": "[]", "b": '{"pool": 1}'})
    assert why_waiting(redis, QUEUE) is not None


def test_a_queue_that_waits_is_counted_without_what_workers_hold(redis: Redis) -> None:
    broker.push(redis, JobMessage("j", TASK), QUEUE, Priority.HIGH)
    assert str(why_waiting(redis, QUEUE)).endswith("1 job waits")
