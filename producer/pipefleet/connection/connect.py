"""Clients of Redis: their time-outs and retries, their connections after a fork, and subscriptions.

Settings come in, redis-py clients go out; sessions and workers call `connect`. A client raises redis-py's errors; `redis_errors`
turns these into errors of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipefleet.connection.failover import leave_replicas
from pipefleet.errors import UsageError
from pipefleet.settings import Settings

if TYPE_CHECKING:
    from redis import Redis


def connect(settings: Settings) -> Redis:
    """A thread-safe Redis client that connects at its first command, not here.

    A command waits for at most twice `redis_timeout`, the making of its connection included.

    Raises UsageError for a URL with an option that redis-py does not take.
    """
    from redis import Redis

    from pipefleet.connection.retries import BoundedRetry

    try:
        redis = Redis.from_url(
            settings.redis_url,
            socket_timeout=settings.redis_timeout,
            socket_connect_timeout=min(5.0, settings.redis_timeout),
            health_check_interval=30,
            retry=BoundedRetry(settings.redis_timeout),
        )
        leave_replicas(redis)
    except ValueError as error:
        raise UsageError(f"PIPEFLEET_REDIS_URL cannot be used: {error}") from None
    return redis


_left_to_parents: list[Any] = []
"""Connection pools that this process inherited by a fork. They stay open: closing one could wait for a lock that a thread of the
parent held."""


def renew_connections(redis: Redis, settings: Settings) -> None:
    """In a forked process: give `redis` a pool of its own, and leave the parent's connections alone. Opens no connection."""
    fresh = connect(settings)
    fresh.auto_close_connection_pool = False
    _left_to_parents.append(redis.connection_pool)
    redis.connection_pool = fresh.connection_pool


@contextmanager
def subscribed(redis: Redis, channel: str) -> Iterator[Any]:
    """A redis-py PubSub that listens on one channel."""
    listener: Any = redis.pubsub()  # type: ignore[no-untyped-call]
    with listener:
        listener.subscribe(channel)
        yield listener
