"""Connections that leave a server once it has become a replica, because their address may lead to the primary by now.

A failover that moves an address often leaves the connections to the old primary open, and redis-py would keep them. `connect`
applies this to every client. The answer of the replica is still raised; the next command connects anew.
"""

from __future__ import annotations

import functools
from typing import Any

from pipefleet.connection.answers import is_of_replica, word_of


class _Leaving:
    """A mix-in for redis-py's connections: a connection that got the answer of a replica closes at the end of its command."""

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """The next answer. Raises redis-py's errors."""
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if is_of_replica(word_of(error)):
                self.mark_for_reconnect()  # type: ignore[attr-defined]
            raise


@functools.cache
def leaving(kind: type[Any]) -> type[Any]:
    """A subclass of the connection class `kind`, whose connections leave a replica."""
    return type(f"Leaving{kind.__name__}", (_Leaving, kind), {})


def leave_replicas(redis: Any) -> Any:
    """Make the pool of `redis` give connections that leave a replica; returns `redis`. It must not have connected yet."""
    pool = redis.connection_pool
    pool.connection_class = leaving(pool.connection_class)
    return redis
