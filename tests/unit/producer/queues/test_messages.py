"""The envelope that the producer writes itself, against what Celery writes and what a stock consumer reads."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from celery import Celery
from kombu import Queue
from kombu.message import Message

from pipefleet.client import Client
from pipefleet.contract.messages import MAX_MESSAGE_BYTES, TASK_NAME, JobItem, JobMessage, Priority, decode_message
from pipefleet.errors import ContractError
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import COST_HEADER, TIME_HEADER, celery_app, celery_message, push_job
from pipefleet.queues.keys import ledger_keys
from pipefleet.queues.looking import queue_depth, queued_ids

QUEUE = "pipefleet.text-classification"
JOB = JobMessage(
    id="job1",
    task="text-classification",
    items=(JobItem("0", "Süß — “quoted”\n"),),
    reply="pipefleet:done:0123456789abcdef0123456789abcdef",
)
OWN_HEADERS = {COST_HEADER, TIME_HEADER}
VARIES = {"delivery_tag", "reply_to", "origin"}
"""What differs between any two messages of Celery, or names the process that sent them."""


@pytest.fixture
def app(client: Client) -> Celery:
    return celery_app(client.settings, queue=QUEUE)


def ours(client: Client, priority: Priority = Priority.NORMAL) -> dict[str, Any]:
    pipe = client.redis.pipeline()
    push_job(pipe, JOB, QUEUE, priority)
    pipe.execute()
    return newest(client, priority)


def celerys(client: Client, app: Celery, priority: Priority = Priority.NORMAL) -> dict[str, Any]:
    app.send_task(
        TASK_NAME, args=[JOB.to_json()], task_id=JOB.id, queue=QUEUE, priority=int(priority), ignore_result=True
    )
    return newest(client, priority)


def newest(client: Client, priority: Priority) -> dict[str, Any]:
    name = QUEUE if priority is Priority.HIGH else f"{QUEUE}\x06\x16{int(priority)}"
    raw: Any = client.redis.lindex(name, 0)
    assert raw, f"nothing in {name!r}; there is {client.redis.keys('*')}"
    envelope: dict[str, Any] = json.loads(raw)
    return envelope


def body(envelope: dict[str, Any]) -> Any:
    message = Message(
        body=envelope["body"],
        content_type=envelope["content-type"],
        content_encoding=envelope["content-encoding"],
        accept=["application/json"],
    )
    return message.decode()


@pytest.mark.parametrize("priority", Priority)
def test_it_lies_in_the_list_that_celery_would_choose(client: Client, app: Celery, priority: Priority) -> None:
    mine, theirs = ours(client, priority), celerys(client, app, priority)
    assert mine["properties"]["priority"] == theirs["properties"]["priority"] == int(priority)


def test_it_has_the_fields_of_celerys_own(client: Client, app: Celery) -> None:
    mine, theirs = ours(client), celerys(client, app)
    assert set(mine) == set(theirs)
    assert set(mine["headers"]) - set(theirs["headers"]) == OWN_HEADERS
    assert set(mine["headers"]) >= set(theirs["headers"])
    assert set(theirs["properties"]) - set(mine["properties"]) == {"body_encoding"}  # the body is the JSON text itself
    assert set(mine["properties"]) <= set(theirs["properties"])
    for part in ("headers", "properties"):
        names = set(mine[part]) - VARIES - OWN_HEADERS - {"argsrepr"}
        assert {name: mine[part][name] for name in names} == {name: theirs[part][name] for name in names}
    assert (mine["content-type"], mine["content-encoding"]) == (theirs["content-type"], theirs["content-encoding"])


def test_its_body_says_the_same_as_celerys_own(client: Client, app: Celery) -> None:
    mine, theirs = ours(client), celerys(client, app)
    theirs["body"] = base64.b64decode(theirs["body"])
    assert body(mine) == body(theirs)
    assert decode_message(body(mine)[0][0]) == JOB


def test_a_payload_shows_neither_in_headers_nor_in_the_dashboard(client: Client) -> None:
    envelope = ours(client)
    assert "quoted" not in json.dumps({**envelope, "body": ""})
    assert envelope["headers"]["argsrepr"] == "('text-classification',)"


def test_a_stock_consumer_takes_it_and_the_ledger_shows_it(client: Client, app: Celery) -> None:
    ours(client)
    assert list(queued_ids(client.redis, QUEUE)) == [JOB.id]
    with app.connection_for_read() as connection, connection.channel() as channel:
        message = Queue(QUEUE)(channel).get(accept=["json"])
        args, kwargs, embedded = message.decode()
        assert (decode_message(args[0]), kwargs, embedded["chain"]) == (JOB, {}, None)
        assert (message.headers["task"], message.headers["id"]) == (TASK_NAME, JOB.id)
        assert message.properties["correlation_id"] == JOB.id
        waiting = queue_depth(client.redis, QUEUE)
        assert (waiting["normal"], waiting["unacked"]) == (0, 1)
        assert list(queued_ids(client.redis, QUEUE)) == [JOB.id]
        message.ack()
    assert queue_depth(client.redis, QUEUE) == {"high": 0, "normal": 0, "low": 0, "unacked": 0, "delayed": 0}
    assert list(queued_ids(client.redis, QUEUE)) == []


def test_each_queue_has_a_ledger_of_its_own(client: Client) -> None:
    keys = [set(ledger_keys(queue).values()) for queue in (QUEUE, QUEUE + ".other")]
    assert not keys[0] & keys[1]


def test_priorities_are_served_high_first_and_first_come_first_served(client: Client, app: Celery) -> None:
    pipe = client.redis.pipeline()
    for name, priority in [("low1", 9), ("normal1", 3), ("high1", 0), ("low2", 9), ("high2", 0), ("normal2", 3)]:
        job = JobMessage(id=name, task=JOB.task, items=JOB.items)
        push_job(pipe, job, QUEUE, Priority(priority))
    pipe.execute()
    with app.connection_for_read() as connection, connection.channel() as channel:
        queue = Queue(QUEUE)(channel)
        served = []
        for _ in range(6):
            message = queue.get(accept=["json"])
            served.append(message.headers["id"])
            message.ack()
    assert served == ["high1", "high2", "normal1", "normal2", "low1", "low2"]


def test_a_message_above_the_bound_is_refused_with_both_figures() -> None:
    job = JobMessage(id="1", task=JOB.task, items=(JobItem("0", "ü" * (MAX_MESSAGE_BYTES // 2)),))
    with pytest.raises(ContractError, match=rf"a message of \d+ bytes is above the bound of {MAX_MESSAGE_BYTES}"):
        celery_message(job, QUEUE, Priority.LOW)


def test_many_thousand_queued_jobs_are_listed_in_pages(client: Client) -> None:
    pipe = client.redis.pipeline()
    for number in range(2500):
        push_job(pipe, JobMessage(id=str(number), task=JOB.task, items=JOB.items), QUEUE, Priority.LOW)
    pipe.lpush(QUEUE, "not one of ours", json.dumps([1]), json.dumps({"headers": None}))
    pipe.execute()
    found = list(queued_ids(client.redis, QUEUE))
    assert sorted(found, key=int) == [str(number) for number in range(2500)]
    assert queue_depth(client.redis, QUEUE) == {"high": 3, "normal": 0, "low": 2500, "unacked": 0, "delayed": 0}


def test_a_message_that_is_nested_beyond_measure_is_passed_over(client: Client) -> None:
    client.redis.lpush(QUEUE, "[" * 100_000)
    client.redis.lpush(ledger_keys(QUEUE)["dead_key"], "[" * 100_000)
    assert list(queued_ids(client.redis, QUEUE)) == []
    (letter,) = dead_letters.dead_letters(client.redis, QUEUE)
    assert letter.job_id is None
