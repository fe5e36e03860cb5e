"""Events that nobody hears are not made; a listener hears them at once, or after a moment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from kombu import Connection
from redis import Redis

from pipefleet_workers.delivery.audience import PROBE_SECONDS, Audience, audience_of
from tests.servers import Server, programs


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(programs()[0], tmp_path_factory.mktemp("redis"))
    yield one
    one.kill()


def test_nobody_is_absent_before_the_first_event() -> None:
    assert not Audience().absent


def test_after_an_unheard_event_there_is_silence_until_the_next_probe() -> None:
    clock = Clock()
    audience = Audience(clock)
    audience.note("task.multi", 0)
    assert audience.absent
    clock.now += PROBE_SECONDS
    assert not audience.absent


def test_a_heartbeat_that_is_heard_ends_the_silence_and_an_unheard_one_begins_none() -> None:
    audience = Audience(Clock())
    audience.note("worker.heartbeat", 0)
    assert not audience.absent
    audience.note("task.multi", 0)
    audience.note("worker.heartbeat", 1)
    assert not audience.absent


def test_a_dispatcher_of_another_transport_has_no_audience() -> None:
    assert audience_of(SimpleNamespace(producer=None)) is None
    assert audience_of(SimpleNamespace(producer=SimpleNamespace(_channel=object()))) is None


def test_redis_tells_a_channel_who_hears(server: Server, tmp_path: Path) -> None:
    transport = "pipefleet_workers.delivery.transport:Transport"
    with Connection(server.url, transport=transport) as connection, Redis(port=server.port) as redis:
        channel = connection.channel()
        channel.exchange_declare("celeryev", "fanout")
        channel.audience = Audience(Clock())
        channel._put_fanout("celeryev", {}, "task.multi")
        assert channel.audience.absent
        listener = redis.pubsub()
        listener.psubscribe("/0.celeryev/*")
        assert listener.get_message(timeout=20.0)["type"] == "psubscribe"
        channel._put_fanout("celeryev", {}, "worker.heartbeat")
        assert not channel.audience.absent
        assert listener.get_message(timeout=20.0)["channel"] == b"/0.celeryev/worker.heartbeat"
