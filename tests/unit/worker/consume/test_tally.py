"""What is counted: items by what became of them, failures by their codes, work where it was done."""

from __future__ import annotations

from typing import Any

import pytest
from redis import Redis

from pipefleet.contract.messages import JobItem, JobState
from pipefleet.contract.records import JobFailure
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.ending import LOST, Ending, before, shard_ending, single_ending
from pipefleet_workers.items import JobContext, Outcome, Work
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.pulse import Pulse
from pipefleet_workers.observe.totals import Items, WorkCount, read_done, read_items, record_items
from tests.unit.worker.consume.fakes import FakeClock, single


def outcome(code: str | None = None, stage: str = "decode") -> Outcome:
    context = JobContext("job", None, {}, 3, None, Outcomes((0,)))
    work = Work(context, 0, JobItem("0", "secret words"), {}, 1)
    return Outcome(work, failure=None if code is None else JobFailure(code, "secret words are bad", stage))


MANY = [outcome(), outcome(), outcome("bad_input"), outcome("bad_input"), outcome("cancelled"), outcome("expired")]


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"pool": "pool", **labels})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("pool")


def test_every_state_has_a_series_of_its_own_from_the_start(metrics: Metrics) -> None:
    tally = Tally(metrics, WorkCount())
    assert [value(metrics, "pipefleet_items_total", state=state) for state in ("cancelled", "expired")] == [0, 0]
    tally.items(MANY)
    states = ("succeeded", "failed", "cancelled", "expired")
    assert [value(metrics, "pipefleet_items_total", state=state) for state in states] == [2, 2, 1, 1]


def test_only_failures_are_counted_as_failures(metrics: Metrics) -> None:
    Tally(metrics, WorkCount()).items(MANY)
    assert value(metrics, "pipefleet_item_failures_total", code="bad_input", stage="decode") == 2
    assert value(metrics, "pipefleet_item_failures_total", code="cancelled", stage="decode") is None
    assert value(metrics, "pipefleet_item_failures_total", code="expired", stage="decode") is None


def test_totals_are_what_prometheus_has(metrics: Metrics) -> None:
    tally = Tally(metrics, WorkCount())
    tally.items(MANY)
    tally.cancelled(3)
    tally.failed(JobFailure("killed_worker", "died", "consume"))
    totals = metrics.totals()
    assert (totals.items, totals.failed, totals.cancelled, totals.expired) == (10, 3, 4, 1)
    counted = [value(metrics, "pipefleet_items_total", state=state) for state in JobState if state.final]
    assert sum(one or 0 for one in counted) == totals.items


def test_a_single_job_counts_as_what_its_record_says(metrics: Metrics) -> None:
    tally = Tally(metrics, WorkCount())
    failure = JobFailure("forbidden", "the result cannot be written", "write")
    for ending in (Ending(JobState.FAILED, failure=failure), before(JobState.CANCELLED), before(JobState.SUCCEEDED)):
        tally.single(ending)
    totals = metrics.totals()
    assert (totals.items, totals.failed, totals.cancelled) == (2, 1, 1)
    assert value(metrics, "pipefleet_item_failures_total", code="forbidden", stage="write") == 1


def test_work_counts_where_it_was_done(redis: Redis, metrics: Metrics) -> None:
    work = WorkCount()
    tally = Tally(metrics, work)
    for ending in (Ending(JobState.SUCCEEDED), Ending(JobState.FAILED), before(JobState.SUCCEEDED), LOST):
        tally.done(single(cost=2.0), ending)
    work.flush(redis, "pool")
    assert read_done(redis, "pool").cost == 4.0


def test_the_fleet_hears_of_each_item_once(redis: Redis, metrics: Metrics) -> None:
    clock = FakeClock()
    pulse, tally = Pulse(metrics, clock), Tally(metrics, WorkCount())
    metrics.processed([{"forward": 0.1}] * 6)
    for told in (6, 0):
        if told:
            tally.items(MANY)
        clock.now += 2.0
        beat = pulse.beat()
        assert (beat.items, beat.items_per_second) == (told, told / 2)
        record_items(
            redis, "pool", items=beat.items, failed=beat.failed, cancelled=beat.cancelled, expired=beat.expired
        )
        pulse.told(beat)
    assert read_items(redis, "pool") == Items(6, 2, 1, 1)


@pytest.mark.parametrize(
    ("outcomes", "text"),
    [(MANY[:2], "2 succeeded"), (MANY, "2 succeeded, 4 failed"), (MANY[2:], "0 succeeded, 4 failed")],
)
def test_a_shard_tells_its_counts(outcomes: Any, text: str) -> None:
    assert shard_ending(outcomes) == Ending(JobState.SUCCEEDED, text)


def test_what_celery_is_told_holds_nothing_of_the_input() -> None:
    assert single_ending(JobState.FAILED, outcome("bad_input").failure).text == "bad_input in decode"
    assert single_ending(JobState.SUCCEEDED, None).text == "succeeded"
