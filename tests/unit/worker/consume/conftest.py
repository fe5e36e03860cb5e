"""Fixtures of the tests with a real Celery: a server, and workers that end with the test and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from celery.worker import state
from redis import Redis

from tests.chaos.events import Events
from tests.servers import Server, programs
from tests.unit.conftest import eventually
from tests.unit.worker.consume.celery_world import Fleet
from tests.unit.worker.consume.fakes import Bench


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(programs()[0], tmp_path_factory.mktemp("redis"))
    yield one
    one.kill()


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
