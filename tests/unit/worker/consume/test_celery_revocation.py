"""Jobs that Celery's `revoke` and `terminate` end: running, waiting for their time, in their queue, or queued again."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state

from pipefleet.contract.messages import TASK_NAME, JobState
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import TIME_HEADER
from pipefleet.queues.looking import queue_depth
from pipefleet_workers.consume.celery_task import CeleryDelivery, Steps
from pipefleet_workers.ending import REVOKED, Ending
from tests.unit.conftest import eventually
from tests.unit.worker.consume.celery_world import QUEUE, Fleet, revoke
from tests.unit.worker.consume.fakes import shard, single


@pytest.mark.parametrize("options", [{}, {"terminate": True}, {"terminate": True, "signal": "SIGKILL"}])
def test_a_job_that_runs_is_revoked(fleet: Callable[..., Fleet], options: dict[str, Any]) -> None:
    one = fleet()
    one.put(single("runs"))
    one.bench.engine.work("runs")
    revoke(one, "runs", **options)
    assert one.shows("runs", "REVOKED")
    assert one.bench.reporter.states["runs"] is JobState.CANCELLED
    assert one.bench.reporter.failures["runs"].message == REVOKED
    one.bench.engine.end("runs")
    assert one.events.of("runs")[-1] == "task-revoked"


def test_terminate_by_its_own_name_revokes_too(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("runs"))
    one.bench.engine.work("runs")
    one.app.control.terminate("runs", reply=True, timeout=20, limit=1)
    assert one.shows("runs", "REVOKED")
    one.bench.engine.end("runs")


def test_a_job_that_waits_for_its_eta_is_revoked(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("job"), id="celery-name", eta=(datetime.now(UTC) + timedelta(hours=1)).isoformat())
    assert eventually(lambda: queue_depth(one.redis, QUEUE)["delayed"] == 1)
    revoke(one, "celery-name")
    assert one.shows("celery-name", "REVOKED")
    assert one.bench.reporter.states["job"] is JobState.CANCELLED


def test_a_job_that_is_revoked_in_its_queue_ends_when_it_comes(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.app.control.cancel_consumer(QUEUE, reply=True, timeout=20, limit=1)
    one.put(single("waits"))
    revoke(one, "waits")
    one.app.control.add_consumer(QUEUE, reply=True, timeout=20, limit=1)
    assert one.shows("waits", "REVOKED")
    assert one.bench.reporter.states["waits"] is JobState.CANCELLED
    assert not one.bench.engine.inside


def test_a_job_that_is_queued_after_its_id_was_revoked_runs(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    revoke(one, "again")
    one.put(single("again"), **{TIME_HEADER: time.time() + 1})
    one.bench.engine.end("again")
    assert one.shows("again", "SUCCESS")


def test_a_revoked_shard_becomes_a_dead_letter(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    revoke(one, "run-0")
    one.put(shard(), **{TIME_HEADER: 1.0})
    assert one.shows("run-0", "REVOKED")
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == 1)
    (letter,) = dead_letters.dead_letters(one.redis, QUEUE)
    assert (letter.reason, letter.job_id) == (REVOKED, "run-0")
    assert [reason for _, reason in one.refused] == [REVOKED]


def test_a_request_that_began_after_its_end_is_not_active() -> None:
    """The event loop keeps no order of what it is asked to do, and a revoked job may begin after its end."""
    asked: list[Callable[[], None]] = []

    class Request:
        id, name, args, expires = "job", TASK_NAME, [{}], None
        time_start = worker_pid = None

        class message:
            headers: dict[str, Any] = {}
            properties: dict[str, Any] = {}

        def acknowledge(self) -> None:
            """Nothing to do."""

    class Celery:
        event_dispatcher = None
        call_soon = staticmethod(asked.append)

    for order in (1, -1):
        delivery = CeleryDelivery(Request(), Celery(), SimpleNamespace(steps=Steps()))  # type: ignore[arg-type]
        delivery.started()
        delivery.started()
        delivery.done(Ending(JobState.CANCELLED, here=False))
        for step in asked[::order]:
            step()
        asked.clear()
        assert not len(state.active_requests)
        assert not state.requests


def test_whether_a_job_was_queued_before_its_revocation_is_told_by_the_servers_clock(
    fleet: Callable[..., Fleet],
) -> None:
    one = fleet()
    one.task.clock = lambda: 5000.0  # whatever this machine's clock says
    revoke(one, "again")
    one.put(single("again"), **{TIME_HEADER: 5001.0})
    one.bench.engine.end("again")
    assert one.shows("again", "SUCCESS")
