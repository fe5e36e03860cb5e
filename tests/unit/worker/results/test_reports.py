"""Single jobs that are reported together: what one of them cannot have written to Redis or S3 is not its neighbours' affair."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from redis import Redis

from pipefleet.contract.messages import JobItem, JobMessage, JobState
from pipefleet.contract.records import JobFailure, JobRecord, read_record
from pipefleet.errors import ServiceUnavailableError
from pipefleet.queues.keys import job_key
from pipefleet.settings import Settings
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.ending import Ending
from pipefleet_workers.items import Encoded, JobContext, Outcome, Work
from pipefleet_workers.results.records import STORED_AT_ONCE
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import WorkerStore
from tests.unit.conftest import eventually

TASK = "text-classification"
SECONDS = 60.0


class Gated(WorkerStore):
    """The real store behind a gate."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = threading.Event()
        self.inside = 0

    def put_new(self, uri: str, body: bytes, *, content_type: str) -> bool:
        self.inside += 1
        assert self.gate.wait(SECONDS), "the test never opened the gate"
        return super().put_new(uri, body, content_type=content_type)


def ending(
    name: str, result: Any = None, failure: JobFailure | None = None, **message: Any
) -> tuple[JobMessage, Outcome]:
    context = JobContext(name, None, {}, 3, None, Outcomes(range(1)))
    work = Work(context, 0, JobItem("0", "text"), {}, 1, {"forward": 0.5})
    return JobMessage(name, TASK, items=(work.item,), **message), Outcome(work, result, failure)


def record(redis: Redis, name: str) -> JobRecord:
    found = read_record(redis.hgetall(job_key(name)))
    assert found is not None, name
    return found


def begun(reporter: Reporter, ends: Sequence[tuple[JobMessage, Outcome]]) -> None:
    assert reporter.start_many([message for message, _ in ends]) == [JobState.RUNNING] * len(ends)


def finished(reporter: Reporter, ends: Sequence[tuple[JobMessage, Outcome]]) -> list[Any]:
    """The state that each job reached, or the error that keeps it back."""
    return [one.state if isinstance(one, Ending) else one for one in reporter.finish_many(ends)]


@pytest.fixture
def reporter(redis: Redis) -> Reporter:
    return Reporter(redis, WorkerStore(), Settings(), worker="w")  # type: ignore[call-arg]


class Odd:
    """No JSON."""


@pytest.mark.parametrize("output", [Odd(), float("nan"), 2**70, "lone \ud800"])
def test_a_result_that_cannot_be_written_fails_alone(reporter: Reporter, redis: Redis, output: Any) -> None:
    ends = [ending("a", {"fine": 1}), ending("b", output), ending("c", Encoded(b'{"fine":1}'))]
    begun(reporter, ends)
    assert finished(reporter, ends) == ["succeeded", "failed", "succeeded"]
    assert [record(redis, name).output for name in "ac"] == ['{"fine":1}'] * 2
    failure = record(redis, "b").failure
    assert failure is not None
    assert (failure.code, failure.stage) == ("bad_output", "write")


def test_a_failure_whose_words_have_no_utf8_form_is_told_all_the_same(reporter: Reporter, redis: Redis) -> None:
    failure = JobFailure("model_error", "cannot stand 'lone \ud800'", "forward")
    ends = [
        ending("a", 1),
        ending("b", failure=failure),
        ending("c", failure=JobFailure("cancelled", "so be it", "forward")),
    ]
    begun(reporter, ends)
    assert finished(reporter, ends) == ["succeeded", "failed", "cancelled"]
    assert record(redis, "b").failure == JobFailure("model_error", "cannot stand 'lone ?'", "forward")
    reporter.fail(JobMessage("d", TASK), failure)
    assert record(redis, "d").state is JobState.FAILED
    reporter.fail(JobMessage("lone \ud800", TASK), failure)  # nobody can wait for such a job


def test_a_record_that_redis_refuses_keeps_its_own_job_back_alone(reporter: Reporter, redis: Redis) -> None:
    ends = [ending(name, name) for name in "abc"]
    begun(reporter, ends)
    redis.delete(job_key("b"))
    redis.set(job_key("b"), "of another kind")
    first, second, third = finished(reporter, ends)
    assert (first, third) == ("succeeded", "succeeded")
    assert isinstance(second, ServiceUnavailableError)
    assert [record(redis, name).output for name in "ac"] == ['"a"', '"c"']


def test_a_revocation_ends_what_began_before_it(reporter: Reporter, redis: Redis) -> None:
    begun(reporter, [ending("runs", 1)])
    redis.hset(job_key("waits"), "state", "queued")
    started = record(redis, "runs").started
    assert started is not None
    failure = JobFailure("cancelled", "so be it", "consume")
    for job, at, state in [
        ("runs", started - 0.5, JobState.RUNNING),
        ("runs", started + 0.5, JobState.CANCELLED),
        ("waits", started - 0.5, JobState.CANCELLED),
    ]:
        reporter.revoke(job, failure, at)
        assert record(redis, job).state is state
    reporter.revoke("unknown", failure, started)
    assert not redis.exists(job_key("unknown"))


def test_long_results_are_stored_at_once_and_each_is_its_own(redis: Redis, prefix: str) -> None:
    store = Gated()
    reporter = Reporter(redis, store, Settings(), worker="w")  # type: ignore[call-arg]
    body = Encoded(orjson.dumps("long " * 10_000))
    ends = [ending(f"job{index}", body) for index in range(20)]
    ends += [
        ending("short", "short"),
        ending("named", "short", output=prefix),
        ending("wrong", body, output=f"{prefix}../x/"),
    ]
    begun(reporter, ends)
    states: list[Any] = []
    thread = threading.Thread(target=lambda: states.extend(finished(reporter, ends)), daemon=True)
    thread.start()
    at_once = eventually(lambda: store.inside == STORED_AT_ONCE)
    store.gate.set()
    thread.join(SECONDS)
    assert at_once
    assert states == ["succeeded"] * 22 + ["failed"]
    places = [record(redis, message.id).output_ref for message, _ in ends[:20]]
    assert len({place.uri for place in places if place}) == 20
    named, wrong = record(redis, "named").output_ref, record(redis, "wrong").failure
    assert named is not None
    assert named.uri == f"{prefix}named.json"
    assert wrong is not None
    assert (wrong.code, wrong.stage) == ("bad_input", "write")


def test_a_store_that_is_away_holds_up_only_what_it_should_hold(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    reporter = Reporter(redis, WorkerStore(retries=0, retry_seconds=1.0), Settings(), worker="w")  # type: ignore[call-arg]
    ends = [ending("a", "short"), ending("b", "long " * 10_000), ending("c", "short")]
    begun(reporter, ends)
    first, second, third = finished(reporter, ends)
    assert (first, third) == ("succeeded", "succeeded")
    assert isinstance(second, ServiceUnavailableError)
    assert record(redis, "b").state is JobState.RUNNING


def test_a_record_that_redis_cannot_change_keeps_no_other_job_from_beginning(redis: Redis, reporter: Reporter) -> None:
    bad, strange, good = (f"{name}-{uuid.uuid4().hex}" for name in ("bad", "strange", "good"))
    redis.set(job_key(bad), "no hash")
    redis.hset(job_key(strange), "state", "a state of a later release")
    first, second, third = reporter.start_many([ending(name)[0] for name in (bad, strange, good)])
    assert isinstance(first, ServiceUnavailableError)
    assert (second, third) == (JobState.FAILED, JobState.RUNNING)
