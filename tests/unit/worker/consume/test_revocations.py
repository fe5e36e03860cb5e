"""`revoke`: wherever a job is, its record ends as cancelled, or its shard as a dead letter."""

from __future__ import annotations

import threading

from pipefleet.contract.messages import JobMessage, JobState
from pipefleet_workers.consume.held import RevokedError
from pipefleet_workers.ending import REVOKED, Ending
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import Bench, FakeDelivery, FakeShards, shard, single

REFUSED = f"refused: {REVOKED}"


def check_cancelled(bench: Bench, delivery: FakeDelivery, job: str = "job") -> None:
    assert delivery.wait() == "done"
    assert [(one.state, one.here) for one in delivery.endings] == [(JobState.CANCELLED, True)]
    assert bench.reporter.states[job] is JobState.CANCELLED
    assert bench.reporter.failures[job].message == REVOKED


def test_a_job_that_comes_revoked() -> None:
    bench = Bench()
    delivery = FakeDelivery(single())
    delivery.revoked = True
    bench.consumer.take(delivery)
    check_cancelled(bench, delivery)
    assert not bench.engine.inside


def test_a_job_that_waits_for_its_time_ends_at_once() -> None:
    bench = Bench()
    delivery = bench.take(single(), after=3600.0)
    bench.revoke("job")
    check_cancelled(bench, delivery)


def test_a_job_that_runs_ends_at_once_and_its_work_stops() -> None:
    bench = Bench()
    delivery = bench.take(single())
    work = bench.engine.work("job")
    bench.revoke("job")
    check_cancelled(bench, delivery)
    assert eventually(lambda: work.job.cancelled)
    bench.engine.end("job")
    assert eventually(lambda: not bench.jobs._contexts)
    assert delivery.ends == ["done"]
    assert eventually(lambda: bench.metrics.totals().cancelled == 1)


def test_a_job_is_found_by_the_name_that_a_celery_client_gave_it() -> None:
    bench = Bench()
    delivery = bench.take(single("job"), name="celery-id", after=3600.0)
    bench.revoke("celery-id")
    check_cancelled(bench, delivery)


def test_a_result_that_was_written_before_stays() -> None:
    bench = Bench()
    delivery = bench.take(single(), after=3600.0)
    bench.reporter.states["job"] = JobState.SUCCEEDED
    bench.revoke("job")
    delivery.wait()
    assert delivery.endings == [Ending(JobState.SUCCEEDED, "succeeded before", here=False)]


def test_a_job_in_its_queue_is_cancelled_there() -> None:
    bench = Bench()
    bench.reporter.states["elsewhere"] = JobState.QUEUED
    bench.revoke("elsewhere")
    assert eventually(lambda: bench.reporter.states["elsewhere"] is JobState.CANCELLED)
    bench.revoke("unknown")
    bench.take(single("after"))
    bench.engine.end("after")
    assert "unknown" not in bench.reporter.states


def test_while_redis_is_away_the_end_waits() -> None:
    bench = Bench()
    delivery = bench.take(single(), after=3600.0)
    bench.goes_away()
    bench.revoke("job")
    assert eventually(lambda: not bench.health.well)
    assert not delivery.ends
    bench.comes_back()
    check_cancelled(bench, delivery)


def test_a_job_that_comes_after_its_revocation_runs_also_when_the_revocation_waits() -> None:
    bench = Bench()
    bench.reporter.states["last"] = JobState.QUEUED
    bench.goes_away()
    for name in ("first", "again", "last"):
        bench.revoke(name)
    assert eventually(lambda: not bench.health.well)  # the thread of revocations waits for Redis
    bench.comes_back()
    delivery = bench.take(single("again"))
    bench.engine.work("again")
    assert eventually(lambda: bench.reporter.states["last"] is JobState.CANCELLED)
    bench.engine.end("again")
    assert delivery.wait() == "done"
    assert bench.reporter.states["again"] is JobState.SUCCEEDED


def test_a_drain_while_redis_is_away_gives_the_job_back() -> None:
    bench = Bench()
    delivery = bench.take(single(), after=3600.0)
    bench.goes_away()
    bench.revoke("job")
    assert eventually(lambda: not bench.health.well)
    bench.consumer.drain(0.0)
    assert delivery.wait() == "given back"


def test_a_shard_that_waits_behind_others_is_refused_at_once() -> None:
    free = threading.Event()
    shards = FakeShards(lambda message: (free.wait(20), Ending(JobState.SUCCEEDED))[1])
    bench = Bench(shards)
    first, second = bench.take(shard("first")), bench.take(shard("second"))
    assert shards.entered.wait(20)
    bench.revoke("second")
    assert second.wait() == REFUSED
    free.set()
    assert first.wait() == "done"
    last = bench.take(shard("last"))
    assert last.wait() == "done"
    assert shards.ran == ["first", "last"]


def test_a_shard_that_runs_is_told_and_refused_when_it_has_stopped() -> None:
    def run(message: JobMessage) -> Ending:
        sink = Sink()
        bench.jobs.begin(message, sink, priority=9, patient=True)
        assert sink.abandoned.wait(20)
        assert sink.reason is not None
        raise sink.reason

    bench = Bench(FakeShards(run))
    delivery = bench.take(shard())
    assert bench.shards.entered.wait(20)
    bench.revoke("run-0")
    assert delivery.wait() == REFUSED
    assert eventually(lambda: not bench.jobs._revoked)


def test_a_shard_that_is_revoked_before_its_items_begin() -> None:
    def run(message: JobMessage) -> Ending:
        bench.revoke("run-0")
        assert eventually(lambda: bool(bench.jobs._revoked))
        sink = Sink()
        bench.jobs.begin(message, sink, priority=9, patient=True)
        assert isinstance(sink.reason, RevokedError)
        raise sink.reason

    bench = Bench(FakeShards(run))
    assert bench.take(shard()).wait() == REFUSED


def test_an_unreadable_message_is_refused() -> None:
    bench = Bench()
    delivery = FakeDelivery({"version": 99})
    delivery.revoked = True
    bench.consumer.take(delivery)
    assert delivery.wait().startswith("refused: this worker understands")


class Sink:
    """Where a shard's outcomes go."""

    def __init__(self) -> None:
        self.abandoned = threading.Event()
        self.reason: Exception | None = None

    def deliver(self, *outcomes: object) -> None:
        """Nothing comes."""

    def abandon(self, reason: Exception) -> None:
        self.reason = reason
        self.abandoned.set()
