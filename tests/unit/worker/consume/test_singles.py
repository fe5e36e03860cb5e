"""Single jobs: started and reported together, each ended once, and none left inside the gate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from pipefleet.contract.messages import JobItem, JobMessage, JobState
from pipefleet.contract.records import JobFailure
from pipefleet_workers.consume.held import DrainedError
from pipefleet_workers.consume.singles import SHORT_SECONDS
from pipefleet_workers.ending import LOST, Ending
from pipefleet_workers.items import JobContext, Outcome
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import AWAY, TASK, Bench, FakeDelivery, single


def settled(bench: Bench) -> bool:
    """Nothing is left in the gate, nor among the jobs."""
    return eventually(lambda: bench.consumer._gate.empty and not bench.jobs._contexts)


def test_jobs_that_come_together_are_reported_together() -> None:
    bench = Bench()
    taken = [bench.take(single(f"job {n}")) for n in range(20)]
    for n in range(20):
        bench.engine.end(f"job {n}")
    assert {one.wait() for one in taken} == {"done"}
    assert settled(bench)
    assert bench.metrics.totals().items == 20


def test_the_urgent_ones_of_a_batch_are_admitted_first() -> None:
    bench = Bench()
    bench.goes_away()
    bench.health.check()
    for name, priority in (("low", 9), ("high", 0), ("normal", 3)):
        delivery = FakeDelivery(single(name))
        delivery.priority = priority
        bench.consumer.take(delivery)
    bench.comes_back()
    assert eventually(lambda: len(bench.engine.inside) == 3)
    assert [work.job.id for work in bench.engine.inside] == ["high", "normal", "low"]


def test_jobs_that_cannot_be_started_begin_again_later() -> None:
    bench = Bench()
    bench.reporter.away = True
    delivery = bench.take(single())
    assert eventually(lambda: bool(bench.consumer.later._heap))
    assert settled(bench)
    bench.comes_back()
    assert eventually(lambda: bench.health.well)
    bench.later(60.0)
    bench.engine.end("job")
    assert delivery.wait() == "done"


class TestTheAnswerOfRedis:
    """Where forwards are short, a new job enters the engine before Redis has answered that it runs. Its end waits for this."""

    def bench(self, *, seconds: float = 0.001) -> Bench:
        """A worker whose last forward took so many seconds."""
        bench = Bench()
        first = bench.take(single("first"))
        bench.engine.end("first", seconds=seconds)
        assert first.wait() == "done"
        return bench

    def hold(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
        """Redis answers nothing to starts until the second event is set; the first tells that it was asked."""
        asked, answers, whole = threading.Event(), threading.Event(), bench.reporter.start_many

        def start_many(messages: Sequence[JobMessage]) -> list[JobState | Exception]:
            asked.set()
            assert answers.wait(20)
            return whole(messages)

        monkeypatch.setattr(bench.reporter, "start_many", start_many)
        return asked, answers

    def test_an_outcome_is_reported_after_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = self.bench()
        _, answers = self.hold(bench, monkeypatch)
        delivery = bench.take(single())
        bench.engine.end("job")
        assert not delivery.ended.wait(0.1)
        assert delivery.starts == 0
        answers.set()
        assert delivery.wait() == "done"
        assert delivery.starts == 1

    def test_an_outcome_counts_as_nothing_where_the_job_had_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = self.bench()
        _, answers = self.hold(bench, monkeypatch)
        bench.reporter.states["job"] = JobState.CANCELLED
        delivery = bench.take(single())
        bench.engine.end("job")
        answers.set()
        assert delivery.wait() == "done"
        assert delivery.endings == [Ending(JobState.CANCELLED, "cancelled before", here=False)]
        assert bench.reporter.states["job"] is JobState.CANCELLED
        assert settled(bench)

    def test_a_job_that_had_ended_is_stopped_in_the_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = self.bench()
        _, answers = self.hold(bench, monkeypatch)
        bench.reporter.states["job"] = JobState.CANCELLED
        delivery = bench.take(single())
        work = bench.engine.work("job")
        answers.set()
        assert delivery.wait() == "done"
        assert work.job.stopped("forward") is not None
        assert settled(bench)

    def test_a_drain_waits_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = self.bench()
        _, answers = self.hold(bench, monkeypatch)
        delivery = bench.take(single())
        bench.engine.work("job").job.give_back(DrainedError())
        assert not delivery.ended.wait(0.1)
        answers.set()
        assert delivery.wait() == "given back"
        assert settled(bench)

    @pytest.mark.parametrize(("seconds", "deliveries", "retries"), [(2.0, 1, 0), (0.001, 2, 0), (0.001, 1, 1)])
    def test_a_long_forward_or_another_try_waits_for_it(
        self, monkeypatch: pytest.MonkeyPatch, seconds: float, deliveries: int, retries: int
    ) -> None:
        bench = self.bench(seconds=seconds)
        asked, answers = self.hold(bench, monkeypatch)
        delivery = FakeDelivery(single(), deliveries=deliveries)
        delivery.retries = retries
        bench.consumer.take(delivery)
        assert asked.wait(20)
        assert not bench.engine.inside
        answers.set()
        bench.engine.end("job")
        assert delivery.wait() == "done"
        assert settled(bench)

    @pytest.mark.parametrize("deliveries", [1, 2, 4])
    def test_a_cancelled_job_of_a_model_with_long_forwards_or_after_a_death_enters_no_engine(
        self, deliveries: int
    ) -> None:
        bench = self.bench(seconds=2.0 if deliveries == 1 else 0.001)
        bench.reporter.states["job"] = JobState.CANCELLED
        delivery = bench.take(single(), deliveries=deliveries)
        assert delivery.wait().startswith("refused" if deliveries == 4 else "done")
        assert bench.engine.inside == []
        assert settled(bench)

    def test_a_job_that_is_cancelled_while_it_waits_for_it_is_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = self.bench(seconds=2.0)
        asked, answers = self.hold(bench, monkeypatch)
        bench.take(single())
        assert asked.wait(20)
        bench.consumer.cancel("job")
        answers.set()
        assert bench.engine.work("job").job.stopped("forward") is not None
        bench.engine.end("job")
        assert settled(bench)

    def test_a_long_forward_is_remembered_for_a_while(self) -> None:
        bench = self.bench(seconds=0.02)
        singles = bench.consumer._singles
        for count in range(20):
            delivery = bench.take(single(f"job {count}"))
            bench.engine.end(f"job {count}")
            assert delivery.wait() == "done"
            assert (singles._longest > SHORT_SECONDS) is (count < 6)


def test_jobs_that_cannot_be_reported_begin_again_and_are_counted_once() -> None:
    bench = Bench()
    delivery = bench.take(single())
    bench.engine.work("job")
    bench.goes_away()
    bench.engine.end("job")
    assert eventually(lambda: bool(bench.consumer.later._heap))
    assert settled(bench)
    bench.comes_back()
    assert eventually(lambda: bench.health.well)
    bench.later(60.0)
    bench.engine.end("job")
    assert delivery.wait() == "done"
    assert bench.metrics.totals().items == 1


def test_an_error_of_ours_while_reporting_loses_no_job() -> None:
    bench = Bench()

    def broken() -> None:
        bench.reporter.before_finish = lambda: None
        raise RuntimeError("a bug")

    bench.reporter.before_finish = broken
    delivery = bench.take(single())
    bench.engine.end("job")
    assert eventually(lambda: bool(bench.consumer.later._heap))
    bench.later(60.0)
    bench.engine.end("job")
    assert delivery.wait() == "done"


@pytest.mark.parametrize(
    "message",
    [
        JobMessage("job", "no-such-task", items=(JobItem("0", "text"),)),
        JobMessage("job", TASK, items=(JobItem("0", "text"), JobItem("1", "text"))),
        JobMessage("job", TASK, items=(JobItem("0", "text"),), output="file:///etc/passwd"),
        JobMessage("job", TASK, items=(JobItem("0", "text"),), parameters={"no such": 1}),
        JobMessage("job", TASK, items=(JobItem("0", "text", {"no such": 1}),)),
    ],
)
def test_a_job_that_this_worker_must_not_run_fails_without_the_engine(message: JobMessage) -> None:
    bench = Bench()
    delivery = bench.take(message)
    assert delivery.wait() == "done"
    assert delivery.endings[0].state is JobState.FAILED
    assert delivery.endings[0].text.endswith(" in consume")
    assert not bench.engine.inside
    assert settled(bench)
    assert bench.metrics.totals().failed == 1


def test_a_second_outcome_is_dropped() -> None:
    bench = Bench()
    delivery = bench.take(single())
    work = bench.engine.work("job")
    for failure in (None, JobFailure("late", "late", "forward")):
        work.job.sink.deliver(Outcome(work, failure=failure))
    assert delivery.wait() == "done"
    assert settled(bench)
    assert bench.reporter.states["job"] is JobState.SUCCEEDED
    assert bench.metrics.totals().items == 1


def test_a_job_whose_lease_is_lost_is_neither_reported_nor_counted() -> None:
    bench = Bench()
    delivery = bench.take(single())
    bench.engine.work("job")
    delivery.lease.lost = True
    bench.engine.end("job")
    assert delivery.wait() == "done"
    assert delivery.endings == [LOST]
    assert bench.reporter.states["job"] is JobState.RUNNING
    assert bench.metrics.totals().items == 0


def test_a_failure_of_a_service_makes_a_job_begin_again_until_it_is_patient_no_more() -> None:
    bench = Bench(retries=2)
    delivery = bench.take(single())
    patience: list[Any] = []
    for _ in range(3):
        work = bench.engine.work("job")
        patience.append(work.job.patient)
        bench.engine.inside.clear()
        if work.job.patient:
            work.job.give_back(AWAY)
            assert eventually(lambda: bool(bench.consumer.later._heap))
            bench.later(60.0)
        else:
            work.job.sink.deliver(Outcome(work, failure=JobFailure("unavailable", "away", "fetch")))
    assert delivery.wait() == "done"
    assert patience == [True, True, False]
    assert not bench.jobs.is_away()
    bench.goes_away()
    assert bench.jobs.is_away()
    bench.comes_back()


class TestErrorsOfOurs:
    """An error of a kind that nobody thought of ends no thread, and no job stays behind in the gate."""

    def test_one_job_that_cannot_be_started_is_in_nobodys_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench(retries=0)
        whole = bench.reporter.start_many

        def start_many(messages: Sequence[JobMessage]) -> list[JobState]:
            if any(message.id == "bad" for message in messages):
                raise UnicodeEncodeError("utf-8", "bad", 0, 1, "no such character")
            return whole(messages)

        monkeypatch.setattr(bench.reporter, "start_many", start_many)
        deliveries = together(bench, "a", "bad", "b")
        for name in ("a", "b"):
            bench.engine.end(name)
            assert deliveries[name].wait() == "done"
        self.refused_after_another_try(bench, deliveries["bad"])

    def test_a_job_that_cannot_begin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench(retries=0)
        whole = bench.jobs.begin

        def begin(message: JobMessage, *arguments: Any, **options: Any) -> JobContext:
            if message.id == "bad":
                raise RuntimeError("a bug")
            return whole(message, *arguments, **options)

        monkeypatch.setattr(bench.jobs, "begin", begin)
        deliveries = together(bench, "bad", "a")
        bench.engine.end("a")
        assert deliveries["a"].wait() == "done"
        self.refused_after_another_try(bench, deliveries["bad"])

    def test_an_engine_that_takes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def admit(*_: Any, **__: Any) -> None:
            raise RuntimeError("a bug")

        bench = Bench()
        whole = bench.engine.admit
        monkeypatch.setattr(bench.engine, "admit", admit)
        deliveries = together(bench, "a", "b")
        assert eventually(lambda: len(bench.consumer.later._heap) == 2)
        assert settled(bench)
        monkeypatch.setattr(bench.engine, "admit", whole)
        bench.later(60.0)
        for name, delivery in deliveries.items():
            bench.engine.end(name)
            assert delivery.wait() == "done"

    def test_an_end_that_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def check() -> bool:
            raise RuntimeError("a bug")

        bench = Bench()
        monkeypatch.setattr(bench.health, "check", check)
        delivery = bench.take(single())
        bench.engine.work("job").job.give_back(AWAY)
        assert delivery.wait() == "given back"
        assert settled(bench)

    def refused_after_another_try(self, bench: Bench, delivery: FakeDelivery) -> None:
        assert eventually(lambda: len(bench.consumer.later._heap) == 1)
        assert settled(bench)
        bench.later(60.0)
        assert delivery.wait().startswith("refused: failed 2 times, at last with: ")
        assert settled(bench)


def together(bench: Bench, *names: str) -> dict[str, FakeDelivery]:
    """Deliveries that are taken in at once."""
    bench.goes_away()
    bench.health.check()
    deliveries = {name: FakeDelivery(single(name)) for name in names}
    for delivery in deliveries.values():
        bench.consumer.take(delivery)
    bench.comes_back()
    return deliveries
