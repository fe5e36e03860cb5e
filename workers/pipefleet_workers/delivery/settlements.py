"""Writes the ends of leases (acks, give-backs, dead letters) to Redis. The ledger's thread calls it with a batch.

A batch takes one round trip. If one of its entries cannot be written, the entries are written one by one. RedisError means that the
server is away: the ledger then repeats the whole batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from redis.exceptions import DataError, ResponseError

from pipefleet.connection.scripts import ScriptBatch
from pipefleet_workers.delivery.leases import Acked, Buried, GivenBack, Lease, Settlement
from pipefleet_workers.delivery.scripts import ACK, BURY, GIVE_BACK

log = logging.getLogger(__name__)
Entry = tuple[Lease, Settlement]
_MOST_REASON = 1000
"""Characters of a reason."""
_OWN_FAULTS = ("WRONGTYPE", "is not an integer", "is not a valid float")
"""Replies of Redis about the value under a key. Any other error is the server's, and is waited for."""


class Settlements:
    """Writes the settlements of one queue. A repeated settlement changes nothing, since each is fenced by the lease's owner."""

    def __init__(self, client: Any, keys: Sequence[str], prefix: str) -> None:
        self._redis = client
        self._keys = keys
        self._prefix = prefix

    def write(self, batch: Sequence[Entry]) -> int:
        """Write each settlement that can be written. Returns how many acks came after their lease had ended.

        A settlement that cannot be written is logged; its message is delivered again when the lease has run out. Raises RedisError
        while the server is away or cannot serve; the whole batch must then be written again.
        """
        answers = self._send(batch)
        if answers is None:
            if len(batch) > 1:
                return sum(self.write([entry]) for entry in batch)
            lease, how = batch[0]
            log.error("%s of message %s cannot be written; it is delivered again", type(how).__name__, lease.key)
            return 0
        return sum(len(answer) for answer in answers if isinstance(answer, list))

    def _send(self, batch: Sequence[Entry]) -> list[Any] | None:
        """The answers of the scripts; None if a script fails because of the content of an entry."""
        scripts = ScriptBatch(self._redis)
        for script, arguments in calls(batch, self._prefix):
            scripts.add(script, self._keys, *arguments)
        try:
            answers = scripts.run()
        except (UnicodeError, DataError):  # an argument cannot be encoded; nothing was sent
            return None
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        for error in errors:
            if not _own_fault(error):
                raise error
        return None if errors else answers


def calls(batch: Sequence[Entry], prefix: str) -> list[tuple[str, list[Any]]]:
    """The scripts that write a batch, with their arguments."""
    acked = [lease for lease, how in batch if isinstance(how, Acked)]
    # Redis returns first the message that was put back last. So the oldest message is put back last.
    back = sorted(((one, how) for one, how in batch if isinstance(how, GivenBack)), key=lambda pair: -pair[0].order)
    buried = [(lease, how) for lease, how in batch if isinstance(how, Buried)]
    found: list[tuple[str, list[Any]]] = [
        (GIVE_BACK, [x for one, how in back for x in _give_back(one, how, prefix)]),
        (BURY, [x for lease, how in buried for x in (lease.tag, lease.owner, lease.queue, _reason(how))]),
        (ACK, fences(acked)),
    ]
    return [call for call in found if call[1]]


def fences(leases: Sequence[Lease]) -> list[Any]:
    """Tag and owner of each lease, which the scripts compare."""
    return [x for lease in leases for x in (lease.tag, lease.owner)]


def _give_back(lease: Lease, how: GivenBack, prefix: str) -> tuple[Any, ...]:
    to = lease.list if how.list is None else prefix + how.list
    return (lease.tag, lease.owner, to, int(how.delay * 1e6), lease.deliveries - 1, int(how.retry))


def _reason(how: Buried) -> str:
    """The reason in a form that Redis can store and a reader of the letter can display."""
    return str(how.reason)[:_MOST_REASON].encode(errors="replace").decode()


def _own_fault(error: Exception) -> bool:
    return isinstance(error, ResponseError) and any(one in str(error) for one in _OWN_FAULTS)
