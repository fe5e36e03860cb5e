"""Celery's view of our jobs: a real Celery on a real server, with a consumer that does as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery.worker import WorkController, state
from redis import Redis

from pipefleet.contract.messages import TASK_NAME, JobMessage, JobState, Priority
from pipefleet.contract.records import JobFailure
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import SHARD_HEADER, TIME_HEADER, celery_app, celery_message
from pipefleet.queues.keys import ledger_keys, queue_list, waiting_lists
from pipefleet.queues.looking import queue_depth, queued_ids
from pipefleet.settings import Settings
from pipefleet_workers.consume import control
from pipefleet_workers.consume.celery_task import CeleryDelivery, InferTask, register_alone
from pipefleet_workers.delivery.headers import MalformedError, checked_headers
from pipefleet_workers.ending import LOST, REVOKED, Ending
from tests.chaos.events import Events, listeners
from tests.servers import Server, programs
from tests.unit.conftest import eventually
from tests.unit.consume.fakes import Bench, FakeShards, shard, single

QUEUE = "pipefleet.test"
NAME = "texts@test"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(programs()[0], tmp_path_factory.mktemp("redis"))
    yield one
    one.kill()


class Controller(WorkController):  # type: ignore[misc]
    """A worker that runs in a thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ready = threading.Event()
        super().__init__(*args, **kwargs)

    def on_consumer_ready(self, consumer: Any) -> None:
        self.ready.set()


class Fleet:
    """One Celery worker around a bench, and who looks at it."""

    def __init__(self, server: Server, bench: Bench, events: Events) -> None:
        self.bench, self.events = bench, events
        self.redis = Redis(port=server.port)
        self._others = {client["id"] for client in self.redis.client_list()}
        self.refused: list[tuple[Any, str]] = []
        settings = Settings(redis_url=server.url)
        options = {"lease_seconds": 5.0, "sweep_seconds": 0.1, "only_tasks": [TASK_NAME]}
        self.app = celery_app(
            settings, queue=QUEUE, transport="pipefleet_workers.delivery.transport:Transport", options=options
        )
        self.app.conf.worker_hijack_root_logger = False
        members = {"name": TASK_NAME, "consumer": bench.consumer, "refused": staticmethod(self._refuse)}
        self.task = type("Infer", (InferTask,), members)()
        register_alone(self.app, self.task)
        control.install()
        self.worker = Controller(
            app=self.app, pool="solo", concurrency=1, prefetch_multiplier=16, hostname=NAME, loglevel="ERROR",
            without_gossip=True, without_mingle=True, task_events=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.worker.start, daemon=True)

    def start(self) -> None:
        """Start the worker, and wait until it hears commands.

        It is not pinged: kombu counts a late answer to an earlier ping towards the limit of the next question.
        """
        before = listeners(self.redis)
        self.thread.start()
        assert self.worker.ready.wait(20)
        assert eventually(lambda: bool(listeners(self.redis) - before)), "it takes no commands"

    def lose_connections(self) -> None:
        """The server drops what the worker waits at, and none of those who look at it."""
        for client in self.redis.client_list():
            if (
                client["cmd"] in ("blmove", "eval", "evalsha", "brpop", "subscribe", "psubscribe")
                and client["id"] not in self._others
            ):
                self.redis.client_kill_filter(client["id"])

    def _refuse(self, payload: Any, reason: str) -> None:
        assert threading.current_thread() is not self.thread, "Redis is asked in the event loop"
        self.refused.append((payload, reason))

    def put(self, message: JobMessage, **headers: Any) -> str:
        """Queue a job, with Celery's headers as a foreign client may set them."""
        text = celery_message(message, QUEUE, Priority.NORMAL)
        if headers:
            envelope = json.loads(text)
            envelope["headers"].update(headers)
            text = json.dumps(envelope)
        self.redis.lpush(queue_list(QUEUE, Priority.NORMAL), text)
        return str(headers.get("id", message.id))

    def inspect(self, what: str) -> list[str]:
        """The ids that `celery inspect` lists."""
        answer = getattr(self.app.control.inspect([NAME], timeout=10, limit=1), what)()
        return [one["id"] for one in answer[NAME]]

    def shows(self, job_id: str, wanted: str) -> bool:
        return eventually(lambda: self.events.shown(job_id) == wanted)

    @property
    def empty(self) -> bool:
        """Nothing of ours is in Redis or in Celery's books."""
        keys = ledger_keys(QUEUE)
        left = [
            name
            for name in ("unacked", "owners", "deliveries", "unacked_index")
            if self.redis.exists(keys[f"{name}_key"])
        ]
        books = (state.requests, state.reserved_requests, state.active_requests, state.scheduled_requests)
        return not left and not any(len(book) for book in books)


@pytest.fixture
def fleet(server: Server) -> Iterator[Callable[..., Fleet]]:
    """A function that starts a worker around a bench; it ends with the test, and must leave nothing."""
    started: list[Fleet] = []
    with Redis(port=server.port) as redis:
        redis.flushall()
    with Events(server.url) as events:

        def start(bench: Bench | None = None) -> Fleet:
            one = Fleet(server, bench or Bench(), events)
            one.start()
            started.append(one)
            return one

        yield start
        for one in started:
            assert eventually(lambda one=one: one.empty), "something is left"  # type: ignore[misc]
            state.should_stop = 0
            one.worker.consumer.call_soon(int)  # wakes the event loop
            one.thread.join(20)
            state.should_stop = None
            state.reset_state()


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


@pytest.mark.parametrize("raw", ["[" * 500 + "]" * 500, "[" * 100_000, "[]", '"x"', '{"body": 5}'])
def test_a_control_message_that_is_none_does_not_end_the_worker(fleet: Callable[..., Fleet], raw: str) -> None:
    one = fleet()
    assert one.redis.publish("/0.celery.pidbox", raw) == 1
    assert one.app.control.ping(timeout=10, limit=1)


def test_a_queue_that_cannot_be_consumed_is_refused_and_does_not_end_the_worker(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    (answer,) = one.app.control.add_consumer('a"b', reply=True, timeout=10, limit=1)
    assert "quotes" in answer[NAME]["error"]
    (answer,) = one.app.control.add_consumer("another", reply=True, timeout=10, limit=1)
    assert answer[NAME] == {"ok": "add consumer another"}
    one.app.control.cancel_consumer("another", reply=True, timeout=10, limit=1)
    assert one.app.control.ping(timeout=10, limit=1)


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


def revoke(one: Fleet, job_id: str, **options: Any) -> None:
    (answer,) = one.app.control.revoke(job_id, reply=True, timeout=20, limit=1, **options)
    assert answer[NAME]["ok"].endswith(job_id)


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


def test_a_job_that_expires_before_its_eta_ends_then(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    hour, past = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) - timedelta(seconds=1)
    one.put(single("job"), eta=hour.isoformat(), expires=past.isoformat())
    one.bench.engine.end("job")
    assert one.shows("job", "REVOKED")
    assert one.bench.reporter.states["job"] is JobState.EXPIRED


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"eta": "x"}, "its eta is no time in ISO 8601"),
        ({"eta": "NaN"}, "its eta is no time in ISO 8601"),
        ({"eta": 1e308}, "its eta is no time in ISO 8601"),
        ({"eta": "2030-01-01T00:00:00+99:99"}, "its eta is no time in ISO 8601"),
        ({"expires": "x"}, "its expires is no time in ISO 8601"),
        ({"expires": {"a": 1}}, "its expires is no time in ISO 8601"),
        ({"eta": "9999-12-31T23:59:59"}, "its eta is more than a year ahead"),
        ({"eta": "9999-12-31T23:59:59-12:00"}, "its eta is more than a year ahead"),
    ],
    ids=str,
)
def test_odd_times_are_refused_by_name(headers: dict[str, Any], reason: str) -> None:
    with pytest.raises(MalformedError, match=reason):
        checked_headers({"task": TASK_NAME, "id": "odd", **headers})


def test_odd_times_leave_nothing_in_celerys_books(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    for number, headers in enumerate([{"eta": "x"}, {"expires": "x"}, {"eta": "9999-12-31T23:59:59"}]):
        one.put(single(f"odd-{number}"), **headers)
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == 3)
    assert all(letter.reason.startswith("its e") for letter in dead_letters.dead_letters(one.redis, QUEUE))


def test_a_name_that_is_no_text_ends_neither_the_job_nor_the_worker(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    for name in ("odd", "next"):
        one.put(single(name), shadow={"no": "text"})
        one.bench.engine.end(name)
        assert one.shows(name, "SUCCESS")


def test_a_message_of_an_old_protocol_is_rejected_at_once(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    envelope = json.loads(celery_message(single("old"), QUEUE, Priority.NORMAL))
    body = {"task": TASK_NAME, "id": "old", "args": json.loads(envelope["body"])[0], "kwargs": {}}
    for number in range(5):  # each of them once made the worker connect anew
        envelope["properties"]["delivery_tag"] = f"old-{number}"
        text = json.dumps({**envelope, "headers": {}, "body": json.dumps(body)})
        one.redis.lpush(queue_list(QUEUE, Priority.NORMAL), text)
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == 5)
    assert all(letter.deliveries == 1 for letter in dead_letters.dead_letters(one.redis, QUEUE))


def test_a_header_that_is_no_id_of_a_job_ends_its_message_alone(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    wrong = ["", "two\nlines", "\x1b[2J", "x" * 201]
    for name in wrong:
        one.put(single("job"), id=name)
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == len(wrong))
    one.put(single("good"))
    one.bench.engine.end("good")
    assert one.shows("good", "SUCCESS")
    assert len(one.bench.engine.inside) == 0


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


BUILT_IN = [
    *("celery.backend_cleanup", "celery.chord_unlock", "celery.chain", "celery.group", "celery.map", "celery.starmap"),
    *("celery.chunks", "celery.chord", "celery.accumulate", "celery.ping", "os.system"),
]


def test_no_other_task_runs(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    assert [name for name in one.app.tasks] == [TASK_NAME]
    for name in BUILT_IN:
        one.put(single(f"run-{name}"), task=name)
    envelope = json.loads(celery_message(single("old"), QUEUE, Priority.NORMAL))
    body = {"task": "celery.backend_cleanup", "id": "old", "args": [], "kwargs": {}}
    text = json.dumps({**envelope, "headers": {}, "body": json.dumps(body)})
    one.redis.lpush(queue_list(QUEUE, Priority.NORMAL), text)
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == len(BUILT_IN) + 1)
    letters = dead_letters.dead_letters(one.redis, QUEUE)
    assert {letter.reason for letter in letters} == {f"it asks for another task; this worker runs only {TASK_NAME}"}
    one.put(single("good"))
    one.bench.engine.end("good")
    assert one.shows("good", "SUCCESS")


def test_a_message_cannot_have_the_worker_send_further_messages(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    further = {"task": TASK_NAME, "args": [single("further").to_json()], "kwargs": {}, "options": {"queue": QUEUE}}
    embed = {"callbacks": [further], "errbacks": [further], "chain": [further], "chord": further}
    names = {
        "group": "g",
        "timelimit": [0.001, 0.001],
        "retries": 10**30,
        "shadow": "other",
        "origin": "x",
        "reply_to": QUEUE,
    }
    headers = {**names, "ignore_result": False, "stamped_headers": 7, "stamps": {"a": []}, "replaced_task_nesting": "x"}
    for name in ("good", "bad"):
        envelope = json.loads(celery_message(single(name), QUEUE, Priority.NORMAL))
        args, kwargs, _ = json.loads(envelope["body"])
        envelope["body"] = json.dumps([args, kwargs, embed])
        envelope["headers"] |= {**headers, "link": further, "errbacks": [further]}
        envelope["properties"] |= {"reply_to": QUEUE, "replyTo": QUEUE}
        one.redis.lpush(queue_list(QUEUE, Priority.NORMAL), json.dumps(envelope))
    one.bench.engine.end("good")
    one.bench.engine.end("bad", JobFailure("bad_input", "x", "decode"))
    assert one.shows("good", "SUCCESS")
    assert one.shows("bad", "FAILURE")
    assert eventually(lambda: one.empty)
    assert not any(one.redis.exists(name) for name in waiting_lists(QUEUE))
    assert set(one.bench.reporter.states) == {"good", "bad"}
    assert set(state.total_count) <= {TASK_NAME}


def test_a_single_job_that_calls_itself_a_shard_is_delivered_no_more_often(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    text = celery_message(single("spoof"), QUEUE, Priority.NORMAL)
    envelope = json.loads(text)
    envelope["headers"][SHARD_HEADER] = True
    keys = ledger_keys(QUEUE)
    one.redis.hset(keys["deliveries_key"], envelope["properties"]["delivery_tag"], 3)
    one.redis.lpush(queue_list(QUEUE, Priority.NORMAL), json.dumps(envelope))
    assert eventually(lambda: dead_letters.count_dead_letters(one.redis, QUEUE) == 1)
    (letter,) = dead_letters.dead_letters(one.redis, QUEUE)
    assert (letter.reason, letter.code) == ("delivered 3 times", "killed_worker")
    assert not one.bench.engine.inside


def test_commands_that_load_modules_or_write_files_are_not_answered(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    for command in control.REMOVED:
        (answer,) = one.app.control.broadcast(command, reply=True, timeout=20, limit=1)
        assert list(answer[NAME]) == ["error"]
    for told in ("stats", "registered", "active_queues", "conf", "report", "scheduled", "revoked"):
        assert getattr(one.app.control.inspect([NAME], timeout=20, limit=1), told)() is not None


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


def test_what_is_held_goes_on_when_its_queue_is_left(fleet: Callable[..., Fleet]) -> None:
    one = fleet()
    one.put(single("held"))
    one.bench.engine.work("held")
    one.app.control.cancel_consumer(QUEUE, reply=True, timeout=20, limit=1)
    one.bench.engine.end("held")
    assert one.shows("held", "SUCCESS")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("rate_limit", {"task_name": TASK_NAME, "rate_limit": "1/h"}),
        ("time_limit", {"task_name": TASK_NAME, "hard": 0.001, "soft": 0.001}),
        ("pool_grow", {"n": 1}),
        ("pool_shrink", {"n": 1}),
        ("pool_restart", {}),
        ("autoscale", {"max": 2, "min": 1}),
        ("disable_events", {}),
    ],
)
def test_no_other_command_keeps_a_job_back(
    fleet: Callable[..., Fleet], command: str, arguments: dict[str, Any]
) -> None:
    one = fleet()
    one.put(single("held"))
    one.bench.engine.work("held")
    one.app.control.broadcast(command, arguments=arguments, reply=True, timeout=5, limit=1)
    for name in ("first", "second"):
        one.put(single(name))
        one.bench.engine.end(name)
    one.bench.engine.end("held")
    assert eventually(lambda: one.empty)
    assert {one.bench.reporter.states[name] for name in ("held", "first", "second")} == {JobState.SUCCEEDED}


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
        delivery = CeleryDelivery(Request(), Celery(), None)  # type: ignore[arg-type]
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
