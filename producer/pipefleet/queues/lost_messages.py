"""Shards whose messages Redis has lost while it kept the rest of their run: evicted, purged or trimmed messages.

    lost = shards of the run - ended shards - messages of the pool, if that is above 0

Messages of other jobs count too, because counting needs no right to read messages. So while other jobs wait in the same pool, a
loss is seen once they are fewer than the missing shards. `Run.progress` asks; one look costs two round trips.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import reading
from pipefleet.forking import renew_after_fork
from pipefleet.queues.keys import ledger_keys, run_key, waiting_lists
from pipefleet.queues.revision_notes import queues_of

if TYPE_CHECKING:
    from redis import Redis

    from pipefleet.contract.layout import RunPlan

LOOK_SECONDS = 2.0
"""Seconds between two counts of one run."""
GRACE_SECONDS = 10.0
"""Seconds for which shards must be missing, and nothing of the run may end, before they count as lost: operators move messages."""
MOST_RUNS = 1000
"""Runs that one client remembers."""


@dataclass(slots=True)
class _Seen:
    """One count: ended shards, lost shards, and the monotonic time since which both are the same."""

    ended: int
    lost: int
    since: float
    at: float


class LostMessages:
    """The counts of one client, for runs whose planning has ended. Thread-safe. `monotonic` is a clock in seconds."""

    def __init__(self, redis: Redis, url: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._url = url
        self._monotonic = monotonic
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()
        renew_after_fork(self)

    def why(self, plan: RunPlan) -> str | None:
        """One sentence if shards of the run are lost; None if none is, or not yet for GRACE_SECONDS.

        None also without the right to count. Raises ServiceUnavailableError while Redis is away.
        """
        seen, now = self._seen.get(plan.id), self._monotonic()
        if seen is None or now >= seen.at + LOOK_SECONDS:
            seen = self._look(plan)
        if not seen.lost or now < seen.since + GRACE_SECONDS:
            return None
        shards = "1 shard is" if seen.lost == 1 else f"at least {seen.lost} shards are"
        return (
            f"{shards} neither done nor queued nor with a worker: messages were evicted from Redis, purged or trimmed"
        )

    def suspected(self, run_id: str) -> bool:
        """Whether shards of the run were missing at the last look, even if not yet for GRACE_SECONDS."""
        seen = self._seen.get(run_id)
        return seen is not None and seen.lost > 0

    def after_fork(self) -> None:
        """No thread looks in a child."""
        self._lock = threading.Lock()

    def _look(self, plan: RunPlan) -> _Seen:
        ended, lost = self._count(plan)
        now = self._monotonic()
        with self._lock:
            before = self._seen.get(plan.id)
            still = before is not None and before.lost > 0 and before.ended == ended
            if before is None and len(self._seen) >= MOST_RUNS:
                self._seen.clear()
            seen = _Seen(ended, lost, before.since if before is not None and still else now, now)
            self._seen[plan.id] = seen
        return seen

    def _count(self, plan: RunPlan) -> tuple[int, int]:
        """The numbers of ended shards and of lost shards of the run, as of one moment.

        Workers move messages between the queues of a pool's revisions, so the messages of all revisions count.
        """
        from redis.exceptions import ResponseError

        keys = ledger_keys(plan.queue)
        with redis_errors(self._url), suppress(ResponseError):  # no right to count, or a key of another type
            lists = [name for one in queues_of(self._redis, plan.queue) for name in waiting_lists(one)]
            pipe = reading(self._redis)
            pipe.exists(run_key(plan.id, "planner"))
            pipe.bitcount(run_key(plan.id, "parts"))
            pipe.hlen(run_key(plan.id, "refused"))
            pipe.hlen(keys["unacked_key"])
            for name in (*lists, keys["unreported_key"]):
                pipe.llen(name)
            alive, parts, refused, *messages = pipe.execute()
            ended = parts + refused
            return ended, 0 if alive else max(0, (plan.shards or 0) - ended - sum(messages))
        return 0, 0
