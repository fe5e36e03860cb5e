"""`TextStream` beside entries of a stream that the test writes itself: gaps, repeated texts, foreign entries, lost ends."""

from __future__ import annotations

import asyncio
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


def test_a_stream_that_was_left_has_no_result(stream: TextStream) -> None:
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(JobCancelledError):
        stream.result()


def test_a_failed_read_leaves_no_result(client: Client) -> None:
    client.redis.hset(job_key(JOB), mapping={"state": "running", "queue": "q"})
    stream = TextStream(client, Job(client, JOB), 0.0)
    with pytest.raises(ResultTimeoutError):
        next(stream)
    with pytest.raises(JobCancelledError):
        stream.result()


def test_a_told_end_without_a_result_is_bounded_too(client: Client, redis: Redis) -> None:
    redis.hset(job_key(JOB), mapping={"state": "running", "queue": "q"})
    redis.xadd(text_key(JOB), {"end": 1})
    with pytest.raises(ResultTimeoutError, match=r"gave no result for 0\.1 s and was cancelled"):
        next(TextStream(client, Job(client, JOB), 0.1))
    assert Job(client, JOB).status() is JobState.CANCELLED


def test_another_thread_closes(stream: TextStream, redis: Redis, client: Client) -> None:
    found: list[list[str]] = []
    tell(redis, 0, "Once")
    assert next(stream) == "Once"
    reader = threading.Thread(target=lambda: found.append(list(stream)))
    reader.start()
    while not stream._reading.locked():
        assert reader.is_alive()
    stream.close()
    reader.join(20)
    assert Job(client, JOB).status() is JobState.CANCELLED
    assert found in ([[]], [])


def test_two_threads_share_the_pieces(stream: TextStream, redis: Redis) -> None:
    found: list[str] = []
    readers = [threading.Thread(target=lambda: found.extend(stream)) for _ in range(2)]
    for one in readers:
        one.start()
    text = "".join(str(number % 10) for number in range(100))
    for at, letter in enumerate(text):
        tell(redis, at, letter)
    finish(redis, text)
    for one in readers:
        one.join(20)
    assert sorted("".join(found)) == sorted(text)
    assert stream.text == text


def test_a_task_that_is_cancelled_leaves_and_cancels(stream: TextStream, redis: Redis, client: Client) -> None:
    async def read(begun: asyncio.Event) -> None:
        with stream:
            async for _ in stream:
                begun.set()

    async def leave() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(read(begun))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    tell(redis, 0, "Once")
    asyncio.run(leave())
    assert Job(client, JOB).status() is JobState.CANCELLED


def test_a_task_that_does_not_wait_longer_loses_no_piece(stream: TextStream, redis: Redis) -> None:
    async def read() -> list[str]:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(stream), 0.01)
        tell(redis, 0, "Once")
        first, second = asyncio.create_task(anext(stream)), asyncio.create_task(anext(stream))
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        tell(redis, 4, " upon")
        pieces = [await first, await second]
        finish(redis, "Once upon a time")
        return [*pieces, *[piece async for piece in stream]]

    assert "".join(asyncio.run(read())) == "Once upon a time"


def test_streams_that_wait_keep_no_other_from_reading(client: Client, redis: Redis, stream: TextStream) -> None:
    """An event loop has few threads for blocking calls."""
    for number in range(40):
        redis.hset(job_key(f"waiting-{number}"), mapping={"state": "queued", "queue": "q"})
    waiting = [TextStream(client, Job(client, f"waiting-{number}"), None) for number in range(40)]

    async def read() -> str:
        tasks = [asyncio.create_task(anext(one)) for one in waiting]
        await asyncio.sleep(0)
        tell(redis, 0, "Once")
        piece = await asyncio.wait_for(anext(stream), 20)
        for one, task in zip(waiting, tasks, strict=True):
            one.close()
            task.cancel()
        return piece

    assert asyncio.run(read()) == "Once"
