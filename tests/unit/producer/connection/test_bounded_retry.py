"""Connections that were made before a failover: each is refused once by the old primary, and nobody hears of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from pipefleet.connection.answers import READ_ONLY, word_of
from pipefleet.connection.connect import connect
from pipefleet.settings import Settings
from tests.servers import Server, programs, redis_6
from tests.unit.producer.connection.test_redis_failover import Address

CONNECTIONS = 3


@pytest.fixture(params=dict.fromkeys([*programs(), redis_6()]), ids=lambda program: Path(program).name[:12])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, Server]]:
    servers = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        servers.append(Server(request.param, tmp_path / name))
    yield servers[0], servers[1]
    for server in servers:
        server.kill()


def _client(url: str) -> Redis:
    """A client with as many connections as CONNECTIONS in its pool."""
    redis = connect(Settings(redis_url=url))
    pool: Any = redis.connection_pool
    taken = [pool.get_connection() for _ in range(CONNECTIONS)]
    for connection in taken:
        pool.release(connection)
    return redis


def _each(redis: Any) -> None:
    """A write of each kind, all at once through a connection of its own."""
    pool: Any = redis.connection_pool
    kinds: list[Callable[[], object]] = [
        lambda: redis.rpush("plain", 1),
        lambda: redis.eval("return redis.call('RPUSH', KEYS[1], 1)", 1, "script"),
        lambda: redis.pipeline(transaction=True).rpush("transaction", 1).rpush("transaction", 1).execute(),
    ]
    held = []
    for write in kinds:
        write()
        held.append(pool.get_connection())  # so that the next write takes another one
    for connection in held:
        pool.release(connection)


def test_writes_through_old_connections_reach_the_new_primary_once(pair: tuple[Server, Server]) -> None:
    one, other = pair
    other.follow(one)
    address = Address(one)
    with contextlib.closing(address), contextlib.closing(_client(address.url)) as redis:
        other.lead()
        address.server = other
        one.follow(other)
        _each(redis)
    with other.client() as primary:
        assert [primary.llen(name) for name in ("plain", "script", "transaction")] == [1, 1, 2]


def test_a_replica_behind_new_connections_too_is_named(pair: tuple[Server, Server]) -> None:
    one, other = pair
    other.follow(one)
    with contextlib.closing(_client(other.url)) as redis:
        with pytest.raises(RedisError) as refused:
            redis.rpush("plain", 1)
        assert word_of(refused.value) == READ_ONLY
        assert redis.get("plain") is None
