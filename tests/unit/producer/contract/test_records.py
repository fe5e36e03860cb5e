"""Records of single jobs, and the two scripts that change them, on a real Redis."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis

from pipefleet.connection.connect import subscribed
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import FINISH, START, JobFailure, JobRecord, finish_arguments, read_record
from pipefleet.contract.references import StorageRef
from pipefleet.errors import ContractError
from pipefleet.queues.keys import job_key, reply_channel

FINAL = [state for state in JobState if state.final]
KEY = job_key("job1")


def record(redis: Redis) -> JobRecord | None:
    return read_record(redis.hgetall(KEY))  # type: ignore[arg-type]


def start(redis: Redis, *, now: float = 2.0, worker: str = "w1", ttl: int = 100) -> int:
    (started,) = redis.eval(START, 1, KEY, now, worker, ttl)  # type: ignore[call-overload]
    return int(started)


REPLY = reply_channel("0123456789abcdef" * 2)


def finish(redis: Redis, state: JobState, *, reply: str | None = None, ttl: float = 100.0, **fields: Any) -> int:
    arguments = finish_arguments("job1", state, 3.0, ttl=ttl, reply=reply, fields=fields)
    return int(redis.eval(FINISH, 1, KEY, *arguments))  # type: ignore[call-overload]


@pytest.fixture
def queued(redis: Redis) -> None:
    redis.hset(KEY, mapping={"state": "queued", "task": "text-classification", "queue": "q", "submitted": 1.0})


@pytest.mark.usefixtures("queued")
class TestScripts:
    def test_a_job_goes_from_queued_to_running_to_its_end(self, redis: Redis) -> None:
        assert start(redis) == 1
        assert record(redis) == JobRecord(JobState.RUNNING, 1.0, 2.0, None, "w1", "q")
        assert finish(redis, JobState.SUCCEEDED, output="[1]", timings='{"forward":0.5}') == 1
        expected = JobRecord(JobState.SUCCEEDED, 1.0, 2.0, 3.0, "w1", "q", "[1]", timings={"forward": 0.5})
        assert record(redis) == expected

    @pytest.mark.parametrize("first", FINAL)
    @pytest.mark.parametrize("second", FINAL)
    def test_a_final_state_stays(self, redis: Redis, first: JobState, second: JobState) -> None:
        assert finish(redis, first, output="first") == 1
        before = redis.hgetall(KEY)
        assert finish(redis, second, output="second", error="{}") == 0
        assert start(redis, worker="late") == 0
        assert redis.hgetall(KEY) == before

    def test_a_job_that_was_handed_back_starts_again(self, redis: Redis) -> None:
        assert start(redis, worker="w1") == 1
        assert start(redis, worker="w2", now=5.0) == 1
        found = record(redis)
        assert found is not None
        assert (found.worker, found.started) == ("w2", 5.0)

    def test_of_many_that_finish_at_once_exactly_one_wins_and_is_not_mixed_with_another(self, redis: Redis) -> None:
        for _ in range(20):
            redis.delete(KEY)
            redis.hset(KEY, "state", "running")
            barrier = threading.Barrier(8)

            def end(number: int, barrier: threading.Barrier = barrier) -> int:
                barrier.wait(10)
                won = finish(redis, FINAL[number % 4], output=str(number), worker=str(number))
                start(redis, worker="late")
                return won

            with ThreadPoolExecutor(8) as threads:
                won = list(threads.map(end, range(8)))
            assert sum(won) == 1
            winner = won.index(1)
            found = record(redis)
            assert found is not None
            assert (found.state, found.output, found.worker) == (FINAL[winner % 4], str(winner), str(winner))

    def test_the_winner_alone_is_announced(self, redis: Redis) -> None:
        with subscribed(redis, REPLY) as channel:
            assert channel.get_message(timeout=10)["type"] == "subscribe"
            assert finish(redis, JobState.FAILED, reply=REPLY) == 1
            assert finish(redis, JobState.SUCCEEDED, reply=REPLY) == 0
            redis.publish(REPLY, "end of test")
            heard = [channel.get_message(timeout=10)["data"] for _ in range(2)]
        assert heard == [b"job1", b"end of test"]

    def test_a_record_is_kept_for_a_while_only(self, redis: Redis) -> None:
        start(redis, ttl=50)
        assert 0 < int(redis.ttl(KEY)) <= 50  # type: ignore[arg-type]
        finish(redis, JobState.SUCCEEDED, ttl=1000.9)
        assert 900 < int(redis.ttl(KEY)) <= 1000  # type: ignore[arg-type]


def test_a_worker_may_finish_a_job_whose_record_was_lost(redis: Redis) -> None:
    assert start(redis) == 1
    redis.delete(KEY)
    assert finish(redis, JobState.SUCCEEDED, output="[1]") == 1
    assert record(redis) == JobRecord(JobState.SUCCEEDED, finished=3.0, output="[1]")


def test_nothing_is_known_of_a_job_without_a_state(redis: Redis) -> None:
    assert record(redis) is None
    redis.hset(KEY, "worker", "w1")
    assert record(redis) is None


def test_references_and_failures_are_read_as_they_were_written(redis: Redis) -> None:
    reference = StorageRef("s3://results/a ü.json", size=5, type="application/json")
    failure = JobFailure("out_of_memory", "ungültig", "forward")
    fields = {"output_ref": json.dumps(reference.to_json()), "error": json.dumps(failure.to_json())}
    finish(redis, JobState.FAILED, **fields)
    found = record(redis)
    assert found is not None
    assert (found.output_ref, found.failure) == (reference, failure)


def test_warnings_of_a_record_are_a_bounded_list_of_texts() -> None:
    found = read_record({b"state": b"succeeded", b"warnings": json.dumps([str(index) for index in range(99)]).encode()})
    assert found is not None
    assert found.warnings == tuple(str(index) for index in range(10))
    for text in (b"{}", b"[1]", b"nothing"):
        with pytest.raises(ContractError):
            read_record({b"state": b"succeeded", b"warnings": text})
