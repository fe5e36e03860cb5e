"""Connections that leave a server which has become a replica: their address may lead to the primary by now.

Whoever moves an address after a failover often leaves the connections to the old primary open, and redis-py keeps them.
"""

from __future__ import annotations

import functools
from typing import Any

from pipefleet.connection.answers import is_of_replica, word_of


class _Leaving:
    """Beside a class of redis-py's connections: the answer of a replica ends the connection once its command has ended."""

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
    """The class of connections `kind`, whose connections leave a replica."""
    return type(f"Leaving{kind.__name__}", (_Leaving, kind), {})


def leave_replicas(redis: Any) -> Any:
    """`redis`, whose pool makes connections that leave a replica. It must not have connected yet."""
    pool = redis.connection_pool
    pool.connection_class = leaving(pool.connection_class)
    return redis
