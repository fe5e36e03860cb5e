"""`TextStreams`: what a client can read of a text that is being written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from redis import Redis

from pipefleet.contract.messages import JobItem, Priority
from pipefleet.queues.keys import text_key
from pipefleet_workers.items import Assembly, JobContext, Outcome, Unit, Work
from pipefleet_workers.results.text_streams import TextStreams
from tests.unit.conftest import eventually


class Nowhere:
    def deliver(self, outcome: Outcome) -> None:
        """Nobody waits."""

    def abandon(self, reason: Exception) -> None:
        """Nobody waits."""


def unit(job: str = "job") -> Unit:
    context = JobContext(job, None, {}, int(Priority.NORMAL), None, Nowhere(), streams=True)
    return Unit(Assembly(Work(context, 0, JobItem("0", ""), {}, 0), 1), 0, None, 1, None)


def text_of(unit: Unit, tokens: Sequence[int]) -> str | None:
    return "".join(map(chr, tokens)) if tokens else None


@pytest.fixture
def streams(redis: Redis) -> Iterator[TextStreams]:
    one = TextStreams(redis, text_of)
    one.start()
    yield one
    assert one.stop(10)


def entries(redis: Redis, job: str = "job") -> list[dict[bytes, bytes]]:
    found: Any = redis.xrange(text_key(job))
    return [fields for _, fields in found]


def told(redis: Redis, job: str = "job") -> str:
    return "".join(one[b"text"].decode() for one in entries(redis, job) if b"text" in one)


def wrote(streams: TextStreams, one: Unit, text: str) -> None:
    streams.wrote(one, [ord(letter) for letter in text])


def test_each_character_is_told_once_and_in_order(streams: TextStreams, redis: Redis) -> None:
    one, text = unit(), "Once upon a time — 🦜"
    for end in range(1, len(text) + 1):
        wrote(streams, one, text[:end])
        if end % 5 == 0:
            assert eventually(lambda end=end: told(redis) == text[:end])  # type: ignore[misc]
    assert eventually(lambda: told(redis) == text)
    places = [int(entry[b"at"]) for entry in entries(redis)]
    assert places == sorted(set(places))
    assert 0 < redis.ttl(text_key("job")) <= 600  # type: ignore[operator]
    streams.ended(one.assembly.work.job)
    assert eventually(lambda: entries(redis)[-1] == {b"end": b"1"})


def test_a_character_whose_tokens_are_missing_waits(streams: TextStreams, redis: Redis) -> None:
    one = unit()
    wrote(streams, one, "a\ufffd")
    assert eventually(lambda: told(redis) == "a")
    wrote(streams, one, "aü")
    assert eventually(lambda: told(redis) == "aü")


def test_a_text_that_redis_refuses_goes_with_the_next(streams: TextStreams, redis: Redis) -> None:
    one = unit()
    redis.set(text_key("job"), "no stream")
    wrote(streams, one, "Once")
    other = unit("other")
    wrote(streams, other, "b")
    assert eventually(lambda: told(redis, "other") == "b")
    redis.delete(text_key("job"))
    wrote(streams, one, "Once upon")
    assert eventually(lambda: told(redis) == "Once upon")


def test_a_job_that_is_given_back_has_not_ended(streams: TextStreams, redis: Redis) -> None:
    one = unit()
    wrote(streams, one, "Once")
    assert eventually(lambda: told(redis) == "Once")
    one.assembly.work.job.given_back = True
    streams.ended(one.assembly.work.job)
    again = unit()  # as if another worker began anew
    wrote(streams, again, "On")
    assert eventually(lambda: len(entries(redis)) == 2)
    assert entries(redis)[-1] == {b"at": b"0", b"text": b"On"}


def test_an_error_of_one_text_ends_nothing(redis: Redis) -> None:
    def strange(unit: Unit, tokens: Sequence[int]) -> str:
        if not tokens:
            raise ValueError("no text")
        return "fine"

    streams = TextStreams(redis, strange)
    streams.start()
    streams.wrote(unit("bad"), [])
    streams.wrote(unit(), [1])
    assert eventually(lambda: told(redis) == "fine")
    assert streams.stop(10)
