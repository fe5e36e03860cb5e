"""Chooses the ledger of a channel: one for each server, set of keys and terms.

Ledgers outlive connections: after an outage Celery opens a new channel, which finds the leases of the channel before. `transport`
calls `ledger_for` with a channel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from redis import ConnectionPool, Redis

from pipefleet.connection.failover import leave_replicas
from pipefleet_workers.delivery.leases import LeaseKeys, Terms
from pipefleet_workers.delivery.ledger import Ledger

_ledgers: dict[tuple[Any, ...], Ledger] = {}
_ledgers_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Callback:
    """A function among the transport options.

    When Celery is inspected it sends its options as JSON; a plain function breaks that.
    """

    function: Callable[[Any], None]

    def __call__(self, argument: Any) -> None:
        """Call the function."""
        self.function(argument)

    def __json__(self) -> str:
        return repr(self.function)


def ledger_for(channel: Any) -> Ledger:
    """The ledger of this process for a channel's server, keys and terms; made at the first call."""
    prefix = channel.global_keyprefix
    keys = LeaseKeys(
        *(prefix + key for key in (channel.unacked_key, channel.unacked_index_key, channel.deliveries_key)),
        *(prefix + key for key in (channel.retries_key, channel.owners_key, channel.delayed_key)),
        *(prefix + key for key in (channel.dead_key, channel.unreported_key)),
    )
    terms = _terms(channel)
    parameters = channel._connparams()
    place = tuple(str(parameters.get(name)) for name in ("host", "port", "path", "db", "username"))
    with _ledgers_lock:
        found = _ledgers.get((place, keys, terms))
        if found is None:
            found = _ledgers[place, keys, terms] = Ledger(_ledger_client(parameters, terms), keys, terms)
        return found


def _terms(channel: Any) -> Terms:
    renew = channel.renew_seconds or channel.lease_seconds / 5
    steps = tuple(channel.priority_steps)
    return Terms(
        channel.lease_seconds,
        renew,
        channel.sweep_seconds,
        channel.ack_seconds,
        channel.global_keyprefix,
        channel.sep,
        steps,
        channel.on_dead,
        channel.on_lost,
    )


def _ledger_client(parameters: dict[str, Any], terms: Terms) -> Redis:
    """A client like the channel's own. Its time-outs are so short that a failed call can be repeated before a lease runs out."""
    seconds = max(0.5, min(5.0, terms.lease_seconds / 5))
    bounded = {**parameters, "socket_timeout": seconds, "socket_connect_timeout": seconds, "max_connections": 4}
    redis: Redis = leave_replicas(Redis(connection_pool=ConnectionPool(**bounded)))
    return redis
