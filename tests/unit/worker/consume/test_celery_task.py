"""Celery's view of our jobs: a real Celery on a real server, with a consumer that does as it is told."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from celery.worker import state

from pipefleet.contract.messages import JobMessage, JobState, Priority
from pipefleet.contract.records import JobFailure
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import celery_message
from pipefleet.queues.keys import ledger_keys, queue_list
from pipefleet.queues.looking import queue_depth, queued_ids
from pipefleet_workers.ending import LOST, Ending
from tests.unit.conftest import eventually
from tests.unit.worker.consume.celery_world import QUEUE, Fleet
from tests.unit.worker.consume.fakes import Bench, FakeShards, shard, single


def test_a_job_that_succeeds(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    before = state.all_total_count[0]
    one.put(single("good"))
    one.bench.engine.work("good")
    assert eventually(lambda: one.inspect("active") == ["good"])
    one.bench.engine.end("good")
    assert one.shows("good", "SUCCESS")
    assert one.events.of("good") == ["task-received", "task-started", "task-succeeded"]
    assert one.inspect("active") == one.inspect("reserved") == []
    assert state.all_total_count[0] == before + 1


def test_a_job_that_fails_is_shown_as_failed_without_its_input(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("bad"))
    one.bench.engine.end("bad", JobFailure("bad_input", "<script>secret</script>", "decode"))
    assert one.shows("bad", "FAILURE")
    assert one.events.state.tasks["bad"].exception == "bad_input in decode"


def test_an_expired_job_is_shown_as_revoked(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("old", deadline=1.0))
    one.bench.engine.end("old")
    assert one.shows("old", "REVOKED")
    assert one.events.told[-1]["expired"]
    assert one.bench.reporter.states["old"] is JobState.EXPIRED


def test_celerys_own_expiry_ends_the_record_as_expired(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    past = datetime.now(UTC) - timedelta(seconds=1)
    one.put(single("old"), expires=past.isoformat())
    one.bench.engine.end("old")
    assert one.shows("old", "REVOKED")
    assert one.bench.reporter.states["old"] is JobState.EXPIRED


def test_a_job_that_was_cancelled_in_its_queue_is_shown_as_revoked(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.bench.reporter.states["gone"] = JobState.CANCELLED
    one.put(single("gone"))
    assert one.shows("gone", "REVOKED")
    assert one.events.of("gone") == ["task-received", "task-revoked"]


def test_a_refused_job_is_shown_as_failed_and_goes_to_the_dead_letters(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    message = single("odd")
    one.put(JobMessage(**{**{name: getattr(message, name) for name in ("id", "task")}, "items": ()}))
    assert one.shows("odd", "FAILURE")
    assert [reason for _, reason in one.refused] == ["items must be a list that is not empty"]
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == 1)


def test_shards_that_end_at_once_do_not_stay_active(fleet: Callable[..., Fleet]) -> None:
    one = fleet(Bench(FakeShards(lambda message: Ending(JobState.CANCELLED, here=False)), shards=4))
    names = [one.put(shard(f"run-{index}")) for index in range(60)]
    assert all(one.shows(name, "REVOKED") for name in names)
    assert one.inspect("active") == one.inspect("reserved") == []


def test_a_job_that_is_given_back_is_told_as_rejected(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("back"))
    one.bench.engine.work("back")
    one.app.control.cancel_consumer(QUEUE, reply=True, timeout=20, limit=1)  # or it would come again
    one.bench.consumer.drain(0.0)
    assert eventually(lambda: "task-rejected" in one.events.of("back"))
    assert eventually(lambda: list(queued_ids(one.redis, QUEUE)) == ["back"])


def test_a_lost_job_is_the_other_workers_to_tell(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("lost"))
    one.bench.engine.work("lost")
    (delivery,) = one.bench.consumer.held("lost")
    one.bench.consumer.done(delivery, single("lost"), LOST)
    assert eventually(lambda: one.empty)
    assert one.events.of("lost") == ["task-received", "task-started"]


def test_a_job_that_expires_before_its_eta_ends_then(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    hour, past = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) - timedelta(seconds=1)
    one.put(single("job"), eta=hour.isoformat(), expires=past.isoformat())
    one.bench.engine.end("job")
    assert one.shows("job", "REVOKED")
    assert one.bench.reporter.states["job"] is JobState.EXPIRED


def test_an_eta_is_waited_for_in_redis_and_counts_as_no_delivery(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("job"), eta=(datetime.now(UTC) + timedelta(seconds=2)).isoformat())
    one.bench.engine.work("job")
    (delivery,) = one.bench.consumer.held("job")
    assert (delivery.deliveries, delivery.lease and delivery.lease.retries) == (1, 0)
    one.bench.engine.end("job")
    assert one.shows("job", "SUCCESS")


def test_messages_with_a_far_eta_take_no_place_from_urgent_ones(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    hour = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    for number in range(600):
        one.put(single(f"far-{number}"), eta=hour)
    one.redis.lpush(QUEUE, celery_message(single("urgent"), QUEUE, Priority.HIGH))
    one.bench.engine.end("urgent")
    assert one.shows("urgent", "SUCCESS")
    assert eventually(lambda: queue_depth(one.redis, QUEUE)["delayed"] == 600)
    assert one.inspect("reserved") == []
    one.redis.delete(*ledger_keys(QUEUE).values())


def test_what_is_held_goes_on_when_its_queue_is_left(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("held"))
    one.bench.engine.work("held")
    one.app.control.cancel_consumer(QUEUE, reply=True, timeout=20, limit=1)
    one.bench.engine.end("held")
    assert one.shows("held", "SUCCESS")


def test_an_eta_is_meant_by_the_servers_clock(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.task.clock = lambda: 0.0  # whatever this machine's clock says
    one.put(single("job"), eta=(datetime.now(UTC) - timedelta(seconds=1)).isoformat())
    one.bench.engine.end("job")
    assert one.shows("job", "SUCCESS")


@pytest.mark.parametrize("reconnects", [False, True])
def test_a_worker_that_s3_refuses_leaves_messages_where_they_are_until_it_is_allowed(
    fleet: Callable[..., Fleet], reconnects: bool
) -> None:
    one = fleet()
    waits = queue_list(QUEUE, Priority.NORMAL)
    one.put(single("held"))
    one.bench.engine.work("held")
    one.bench.is_refused()
    assert not one.bench.health.check()
    assert eventually(lambda: one.redis.llen(waits) == 1 and not one.worker.consumer.task_consumer._active_tags)
    if reconnects:
        before = one.worker.consumer.task_consumer
        one.lose_connections()
        assert eventually(lambda: one.worker.consumer.task_consumer not in (None, before))
    one.put(single("new"))
    assert eventually(lambda: one.redis.llen(waits) == 2 and not one.worker.consumer.task_consumer._active_tags)
    one.bench.comes_back()
    for job in ("new", "held"):
        one.bench.engine.end(job)
        assert one.shows(job, "SUCCESS")
