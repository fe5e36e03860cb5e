"""`TextStream` beside entries of a stream that the test writes itself: gaps, repeated texts, foreign entries, lost ends."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import FINISH, finish_arguments
from pipefleet.errors import JobCancelledError, ResultTimeoutError
from pipefleet.jobs.job import Job
from pipefleet.jobs.text_stream import TextStream
from pipefleet.queues.keys import job_key, text_key

JOB = "0123456789abcdef"


@pytest.fixture
def stream(client: Client) -> TextStream:
    client.redis.hset(job_key(JOB), mapping={"state": "running", "queue": "q"})
    return TextStream(client, Job(client, JOB), 20.0)


def tell(redis: Redis, at: Any, text: str | bytes) -> None:
    redis.xadd(text_key(JOB), {"at": at, "text": text})


def finish(redis: Redis, text: str) -> None:
    output = json.dumps([{"generated_text": text}])
    arguments = finish_arguments(JOB, JobState.SUCCEEDED, None, ttl=60, reply=None, fields={"output": output})
    redis.eval(FINISH, 1, job_key(JOB), *arguments)


def test_pieces_come_one_by_one_and_the_rest_from_the_result(stream: TextStream, redis: Redis) -> None:
    tell(redis, 0, "Once")
    assert next(stream) == "Once"
    tell(redis, 4, " upon")
    tell(redis, 9, " a")
    assert next(stream) == " upon a"
    redis.xadd(text_key(JOB), {"end": 1})
    finish(redis, "Once upon a time")
    assert list(stream) == [" time"]
    assert stream.result() == [{"generated_text": "Once upon a time"}]
    assert stream.text == "Once upon a time"


def test_a_job_that_runs_again_repeats_nothing(stream: TextStream, redis: Redis) -> None:
    tell(redis, 0, "Once upon")
    assert next(stream) == "Once upon"
    tell(redis, 0, "Once")
    tell(redis, 4, " upon a ti")
    assert next(stream) == " a ti"
    finish(redis, "Once upon a time")
    assert list(stream) == ["me"]


@pytest.mark.parametrize(
    "entry",
    [
        {"at": 7, "text": "gap"},
        {"at": "x", "text": "a"},
        {"at": -1, "text": "a"},
        {"text": "a"},
        {"at": 0},
        {"at": 0, "text": b"\xff"},
    ],
)
def test_entries_that_say_nothing(stream: TextStream, redis: Redis, entry: dict[str, Any]) -> None:
    redis.xadd(text_key(JOB), entry)
    tell(redis, 0, "Once")
    assert next(stream) == "Once"
    finish(redis, "Once!")
    assert list(stream) == ["!"]


def test_an_end_that_nobody_told(stream: TextStream, redis: Redis) -> None:
    threading.Timer(0.3, lambda: finish(redis, "all of it")).start()
    assert list(stream) == ["all of it"]


def test_another_text_in_the_result(stream: TextStream, redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    tell(redis, 0, "Once")
    assert next(stream) == "Once"
    finish(redis, "Twice")
    assert list(stream) == []
    assert stream.result() == [{"generated_text": "Twice"}]
    assert "its result alone counts" in caplog.text


def test_nothing_comes(client: Client, redis: Redis) -> None:
    redis.hset(job_key(JOB), mapping={"state": "running", "queue": "q"})
    stream = TextStream(client, Job(client, JOB), 0.0)
    with pytest.raises(ResultTimeoutError, match=r"wrote nothing for 0 s and was cancelled"):
        next(stream)
    assert Job(client, JOB).status() is JobState.CANCELLED
    assert list(stream) == []


def test_leaving_cancels(stream: TextStream, redis: Redis, client: Client) -> None:
    tell(redis, 0, "Once")
    with stream:
        next(stream)
    assert Job(client, JOB).status() is JobState.CANCELLED


def test_leaving_before_the_first_piece_cancels(stream: TextStream, redis: Redis, client: Client) -> None:
    stream.close()
    assert Job(client, JOB).status() is JobState.CANCELLED


def test_a_cancelled_job(stream: TextStream, redis: Redis, client: Client) -> None:
    tell(redis, 0, "Once")
    assert next(stream) == "Once"
    Job(client, JOB).cancel()
    with pytest.raises(JobCancelledError):
        list(stream)
