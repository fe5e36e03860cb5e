"""Where the end of a job is told: on the channel of a client, and on no other, whatever a message asks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, JobState, Priority
from pipefleet.contract.records import JobFailure
from pipefleet.queues.celery import celery_message
from pipefleet.queues.keys import CANCELLED_CHANNEL, job_key, reply_channel
from pipefleet.runs.letters import read_content
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Outcome, Work
from tests.unit.shard_worker import ShardWorker

TASK = "text-classification"
QUEUE = f"pipefleet.{TASK}"
ORDER = json.dumps({"method": "shutdown", "arguments": {}, "destination": None})
"""What Celery's workers obey on their control channel; also an id that a job may have."""
CONTROL = "/0.celery.pidbox"
CLIENTS = reply_channel("0123456789abcdef" * 2)
FAILURE = JobFailure("bad_input", "it is bad", "decode")


class Ear:
    """Hears what is published anywhere in Redis."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._listener = redis.pubsub()  # type: ignore[no-untyped-call]
        self._listener.psubscribe("*")
        assert self._listener.get_message(timeout=10)["type"] == "psubscribe"

    def heard(self) -> list[tuple[str, str]]:
        """Channel and text of everything since the last call."""
        self._redis.publish("end of test", "")
        found = []
        while (one := self._listener.get_message(timeout=10))["channel"] != b"end of test":
            found.append((one["channel"].decode(), one["data"].decode()))
        return found

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def ear(redis: Redis) -> Iterator[Ear]:
    one = Ear(redis)
    yield one
    one.close()


@pytest.fixture
def worker(client: Client) -> ShardWorker:
    return ShardWorker(client, QUEUE)


def ended(job_id: str, reply: str) -> tuple[JobMessage, Outcome]:
    item = JobItem("0", "text")
    work = Work(JobContext(job_id, None, {}, 3, None, Outcomes(range(1))), 0, item, {}, 1)
    return JobMessage(job_id, TASK, items=(item,), reply=reply), Outcome(work, "done", None)


def test_a_result_is_told_on_a_clients_channel_alone(worker: ShardWorker, ear: Ear) -> None:
    worker.reporter.finish_many([ended(ORDER, CONTROL), ended("other", CANCELLED_CHANNEL), ended("mine", CLIENTS)])
    assert ear.heard() == [(CLIENTS, "mine")]


def test_an_end_without_the_engine_is_told_on_a_clients_channel_alone(worker: ShardWorker, ear: Ear) -> None:
    for job_id, reply in ((ORDER, CONTROL), ("mine", CLIENTS)):
        message, _ = ended(job_id, reply)
        worker.reporter.end(message, JobState.FAILED, FAILURE)
        worker.reporter.end(message, JobState.FAILED, FAILURE)  # it had ended before, which is told again
    assert ear.heard() == [(CLIENTS, "mine")] * 2


@pytest.mark.parametrize(("reply", "told"), [(CONTROL, []), (CANCELLED_CHANNEL, []), (CLIENTS, [(CLIENTS, ORDER)])])
def test_a_dead_letter_that_nobody_could_read_is_told_on_a_clients_channel_alone(
    worker: ShardWorker, ear: Ear, reply: str, told: list[Any]
) -> None:
    message = JobMessage(ORDER, TASK, items=(JobItem("0", "text"),))
    envelope = json.loads(celery_message(message, QUEUE, Priority.NORMAL))
    body = json.loads(envelope["body"])
    body[0][0] |= {"unknown": 1, "reply": reply}
    letter = worker.bury(json.dumps({**envelope, "body": json.dumps(body)}), "it is malformed")
    worker.burials.letter(letter)
    assert read_content(letter).reply == (reply if told else None)
    assert ear.heard() == told


def test_a_dead_letter_without_the_id_of_a_job_makes_no_record(worker: ShardWorker, redis: Redis) -> None:
    envelope = json.loads(celery_message(JobMessage("job", TASK, items=(JobItem("0", "x"),)), QUEUE, Priority.LOW))
    for job_id in ("", "a\nb", "x" * 10_000, "lone \ud800"):
        envelope["headers"]["id"] = job_id
        worker.burials.letter(worker.bury(json.dumps(envelope)))
    assert not redis.keys(job_key("*"))
