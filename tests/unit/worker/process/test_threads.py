"""The threads of a worker beside its consumer: an error of any kind ends none of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.connection.clock import ServerClock
from pipefleet.queues.keys import CANCELLED_CHANNEL
from pipefleet_workers.observe.stage_trace import Tracer
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.worker import Worker
from tests.unit.conftest import eventually


@pytest.fixture
def worker(client: Client) -> Iterator[Worker]:
    fleet = client.fleet
    one = Worker(fleet, fleet.pools["texts"], client.settings, WorkerSettings(announce_seconds=0.05))
    yield one
    one._stopping.set()


class Cancelled:
    """As the consumer, as far as cancelling goes; the first call fails."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def cancel(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == 1:
            raise RuntimeError("a bug")


def test_it_hears_of_cancelled_jobs_after_what_is_no_text_and_after_an_error(worker: Worker, redis: Redis) -> None:
    consumer = Cancelled()
    threading.Thread(target=worker._listen_for_cancels, args=(consumer,), daemon=True).start()

    def hears(sent: bytes) -> bool:
        redis.publish(CANCELLED_CHANNEL, sent)
        return sent.decode(errors="replace") in consumer.names

    assert eventually(lambda: hears(b"\xff"))
    assert eventually(lambda: hears(b"job"))


def test_it_announces_itself_after_an_error(worker: Worker, redis: Redis) -> None:
    class Facts:
        calls = 0

        def announce(self, redis: Any, *, seconds: float) -> None:
            self.calls += 1
            if self.calls == 1:
                raise RuntimeError("a bug")

    facts = Facts()
    threading.Thread(target=worker._announce, args=(facts, ServerClock(redis)), daemon=True).start()
    assert eventually(lambda: facts.calls >= 2)


def test_a_trace_that_cannot_be_written_fills_no_memory(tmp_path: Path) -> None:
    tracer = Tracer(str(tmp_path / "no folder" / "trace"))
    tracer.start()
    with tracer.span("forward", 1):
        pass
    assert tracer.stop(20)
    assert not tracer._lines._items


def test_a_trace_has_what_was_timed_when_its_writer_has_ended(tmp_path: Path) -> None:
    tracer = Tracer(str(tmp_path / "trace"))
    tracer.start()
    for stage in ("decode", "forward"):
        with tracer.span(stage, 2):
            pass
    assert tracer.stop(20)
    lines = [json.loads(line) for line in (tmp_path / "trace").read_text().splitlines()]
    assert [(line["stage"], line["count"]) for line in lines] == [("decode", 2), ("forward", 2)]
