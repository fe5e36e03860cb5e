"""Shards that Redis has lost while it kept the rest of their run: their messages were evicted, purged or trimmed.

More shards of a run are missing than messages of its pool are left, whosever they are: some of the missing ones have no message.
Counting needs no right to read messages, and costs two round trips now and then. While other jobs wait in the same pool, a loss is
seen once they are fewer than the shards that are missing.
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
"""How long what was counted is taken for true."""
GRACE_SECONDS = 10.0
"""How long shards must be missing, and nothing of the run end, before they are called lost: messages are also moved by hand."""
MOST_RUNS = 1000
"""Runs that are remembered."""


@dataclass(slots=True)
class _Seen:
    """What was counted: shards that have ended, those that are lost, and since when both were so (monotonic seconds)."""

    ended: int
    lost: int
    since: float
    at: float


class Losses:
    """What a client has seen of runs whose planning has ended. Thread-safe. `monotonic` is a clock in seconds."""

    def __init__(self, redis: Redis, url: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._url = url
        self._monotonic = monotonic
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()
        renew_after_fork(self)

    def why(self, plan: RunPlan) -> str | None:
        """One sentence where shards of the run are lost; None where none are, or they have been missing for too short a time.

        None also where the user of Redis has no right to count. Raises ServiceUnavailableError while Redis is away.
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
        """Whether shards of the run seemed to be lost at the last look, be it certain or not."""
        seen = self._seen.get(run_id)
        return seen is not None and seen.lost > 0

    def after_fork(self) -> None:
        """Nobody is looking in a child."""
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
        """How many shards of the run have ended, and how many of the others have no message, as of one moment.

        Workers move messages between the queues of a pool's revisions, so those of all are counted.
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
