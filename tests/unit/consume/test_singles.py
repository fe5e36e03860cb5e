"""Single jobs: started and reported together, each ended once, and none left inside the gate."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.contract import JobItem, JobMessage, JobState
from pipefleet.records import JobFailure
from pipefleet_workers.ending import LOST
from pipefleet_workers.items import Outcome
from tests.unit.conftest import eventually
from tests.unit.consume.fakes import AWAY, TASK, Bench, FakeDelivery, single


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
