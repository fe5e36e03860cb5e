"""Fixtures of the lease transport's tests: each server program of this machine, empty, and workers that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.integration.lease_world import Taker
from tests.servers import Server, programs


@pytest.fixture(scope="module", params=programs(), ids=lambda program: Path(program).name)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(request.param, tmp_path_factory.mktemp("redis"))
    yield one
    one.kill()


@pytest.fixture
def redis(server: Server) -> Iterator[Redis]:
    with Redis(port=server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def taker(server: Server, redis: Redis) -> Iterator[Callable[..., Taker]]:
    """A function that starts a worker."""
    started: list[Taker] = []

    def start(prefetch: int = 100, **options: Any) -> Taker:
        started.append(Taker(server.url, prefetch, options))
        return started[-1]

    yield start
    for one in started:
        one.close()
