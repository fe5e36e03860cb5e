"""Pools that `pipefleet up` could not keep alive. `up` writes them to Redis; `top` and `doctor` read them.

They lie in the Redis hash `pipefleet:parked`, by pool. Entries expire by the server's clock unless `up` writes them again. `Stack`
calls `tell_parked`, and `top.read` calls `parked_pools`. Errors are redis-py's; an entry of another version is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipefleet.contract.messages import encode_json
from pipefleet.foreign import read_object, whole
from pipefleet.printable import printable
from pipefleet.queues.keys import PARKED_KEY

TOLD_SECONDS = 30.0
"""Seconds until an entry expires: three times the pause between two writes."""


@dataclass(frozen=True, slots=True)
class Parked:
    """`down` of the `of` workers of a pool ended again and again, and stay down for a while; `reason` is one line."""

    down: int
    of: int
    reason: str

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.down} of {self.of} workers stay down after ending again and again ({self.reason})"


def tell_parked(redis: Any, parked: Mapping[str, Parked]) -> None:
    """Replace all entries. Raises redis-py's errors."""
    pipe = redis.pipeline(transaction=True)
    pipe.delete(PARKED_KEY)
    for pool, one in parked.items():
        pipe.hset(PARKED_KEY, pool, encode_json(asdict(one)))
    pipe.pexpire(PARKED_KEY, int(TOLD_SECONDS * 1000))
    pipe.execute()


def parked_pools(redis: Any) -> dict[str, Parked]:
    """The parked pools by name. Raises redis-py's errors."""
    found = {}
    for name, raw in redis.hgetall(PARKED_KEY).items():
        try:
            content = read_object(raw)
            reason = printable(str(content["reason"]), 300)
            found[name.decode()] = Parked(whole(content["down"]), whole(content["of"]), reason)
        except (ValueError, LookupError):
            continue  # another version wrote it, which is no reason to fail a view of the fleet
    return found
