"""Messages and commands that foreign clients of Celery send: none of them ends the worker or runs anything but our task."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from celery.worker import state

from pipefleet.contract.messages import TASK_NAME, JobState, Priority
from pipefleet.contract.records import JobFailure
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import SHARD_HEADER, celery_message
from pipefleet.queues.keys import ledger_keys, queue_list, waiting_lists
from pipefleet_workers.consume import control
from pipefleet_workers.delivery.headers import MalformedError, checked_headers
from tests.unit.conftest import eventually
from tests.unit.worker.consume.celery_world import NAME, QUEUE, Fleet
from tests.unit.worker.consume.fakes import single


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
