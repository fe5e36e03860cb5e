"""Warnings of queues that nobody serves: one sentence with the cause and the next step.

A queue comes in; the announcements of workers, and the state of the scaler, are read from Redis. The watcher calls `Lookout`;
the command line and runs call `why_waiting`. `Lookout` raises nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipefleet.fleet.pools import UNNAMED, Pool, model_label
from pipefleet.fleet.revisions import worker_command
from pipefleet.fleet.routing import PREFIX
from pipefleet.foreign import mapping, number, read_object, whole
from pipefleet.forking import renew_after_fork
from pipefleet.printable import printable
from pipefleet.queues.keys import POOLS_KEY, WORKERS_KEY, base_queue, ledger_keys, scaler_key, waiting_lists
from pipefleet.queues.revision_notes import known_revisions

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger("pipefleet")
LOOK_SECONDS = 2.0
"""Seconds between two looks at a queue."""
SAY_SECONDS = 30.0
"""Seconds between two warnings that nobody serves a queue."""
SCALER_SECONDS = 120.0
"""Seconds for which a decision of the scaler counts."""


def why_waiting(redis: Redis, queue: str, *, pool: Pool | None = None) -> str | None:
    """One sentence when no live worker serves `queue`; None when one does. Raises redis-py's errors.

    `pool` is the pool of the queue, if the caller knows it. Otherwise the sentence names the pool that workers announced last.
    """
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(WORKERS_KEY)
    pipe.hgetall(POOLS_KEY)
    (seconds, micros), workers, pools = pipe.execute()
    now, entries = seconds + micros / 1e6, _read(pools)
    served = served_queues(_read(workers), entries, now)
    if queue in served:
        return _barred(queue, _read(workers), entries, now)
    waiting = _count(redis, queue, held=base_queue(queue) not in served)
    pool = pool or _announced(queue, entries) or _noted(redis, queue)
    wanted = _is_wanted(redis, pool.key if pool is not None else None, now)
    return _sentence(queue, pool, waiting, wanted=wanted)


def served_queues(workers: Mapping[str, Any], pools: Mapping[str, Any], now: float) -> set[str]:
    """The queues that live workers consume: for each worker the queue that it names, and the queue of its pool.

    Only this function decides whether a worker serves a queue.
    """
    served: set[str] = set()
    for facts in workers.values():
        if _until(facts) > now:
            named = facts.get("queue") or _pool_queue(pools.get(str(facts.get("pool"))))
            served |= {str(named), base_queue(str(named))}
    return served


def _barred(queue: str, workers: Mapping[str, Any], pools: Mapping[str, Any], now: float) -> str | None:
    """One sentence if S3 refuses every worker that serves a queue; else None."""
    serving = [one for name, one in workers.items() if queue in served_queues({name: one}, pools, now)]
    reasons = [str(one["barred"]) for one in serving if one.get("barred")]
    if not reasons or len(reasons) < len(serving):
        return None
    return f"no worker of {queue} takes jobs: {printable(reasons[0], 400)}"


def _count(redis: Redis, queue: str, *, held: bool) -> int:
    """The number of jobs that wait in a queue; with `held` also the jobs that dead workers of its pool still hold."""
    pipe = redis.pipeline(transaction=False)
    for name in waiting_lists(queue):
        pipe.llen(name)
    if held:
        pipe.hlen(ledger_keys(queue)["unacked_key"])
    return sum(pipe.execute())


class Lookout:
    """Warns, by the logger `pipefleet`, that jobs wait in a queue that nobody serves: at once, then once in SAY_SECONDS.

    Thread-safe. `monotonic` is a clock in seconds.
    """

    def __init__(self, redis: Redis, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._pools: dict[str, Pool] = {}
        self._seen: dict[str, tuple[float, str | None]] = {}
        self._said: dict[str, float] = {}
        renew_after_fork(self)

    def name(self, queue: str, pool: Pool) -> None:
        """Remember that `queue` belongs to `pool`, for the warnings."""
        self._pools[queue] = pool

    def look(self, queue: str) -> None:
        """Look whether a worker serves `queue`, once in LOOK_SECONDS; warn, once in SAY_SECONDS. Raises nothing."""
        now = self._monotonic()
        with self._lock:
            if now < self._seen.get(queue, (now, None))[0]:
                return
            self._seen[queue] = (now + LOOK_SECONDS, self._seen.get(queue, (0.0, None))[1])
        try:
            why = why_waiting(self._redis, queue, pool=self._pools.get(queue))
        except Exception as error:  # noqa: BLE001 - no right to read it, or written by another release
            log.debug("cannot see who serves %s: %s", queue, error)
            return
        with self._lock:
            self._seen[queue] = (now + LOOK_SECONDS, why)
            if why is None:
                self._said.pop(queue, None)  # losing its workers again is news
            if why is None or now < self._said.get(queue, now):
                return
            self._said[queue] = now + SAY_SECONDS
        log.warning("%s", why)

    def known(self, queue: str) -> str | None:
        """The sentence that the last `look` found, or None."""
        with self._lock:
            return self._seen.get(queue, (0.0, None))[1]

    def after_fork(self) -> None:
        """No thread looks in a child."""
        self._lock = threading.Lock()


def _sentence(queue: str, pool: Pool | None, waiting: int, *, wanted: bool) -> str:
    jobs = "1 job waits" if waiting == 1 else f"{waiting} jobs wait"
    served = queue + (f" (model {model_label(pool.model, pool.revision)})" if pool is not None and pool.model else "")
    if wanted:
        return f"no worker serves {printable(served, 300)} yet; the scaler has asked for one; {jobs}"
    start = "pipefleet up" if pool is None else worker_command(pool)
    served = printable(served, 300)
    return f"no worker serves {served} now; start one with `{printable(start, 300)}`; {jobs}"


def _announced(queue: str, pools: Mapping[str, Any]) -> Pool | None:
    """The pool of a queue, from the last announcement, of any age."""
    for name, entry in pools.items():
        fields = entry.get("pool")
        if isinstance(fields, Mapping) and queue in (fields.get("queue"), fields.get("revision_queue")):
            task, model = str(fields.get("task") or ""), str(fields.get("model") or "")
            generation = UNNAMED if fields.get("retired") else 0
            revision = fields.get("revision") and str(fields["revision"])
            return Pool(name.partition("@")[0], task, model, revision, generation=generation)
    return None


def _noted(redis: Redis, queue: str) -> Pool | None:
    """The pool of a queue, from the queue's name and from the notes of revisions."""
    task, _, name = base_queue(queue).removeprefix(PREFIX).partition(".")
    known = known_revisions(redis).get(queue)
    if known is None:
        return Pool(name, task, "") if name else None
    model, revision = known
    return Pool(name, task, model, revision, generation=UNNAMED)


def _is_wanted(redis: Redis, pool: str | None, now: float) -> bool:
    """Whether a scaler decided within SCALER_SECONDS that the pool should have workers: then a worker is starting."""
    try:
        content: Any = redis.get(scaler_key(pool or ""))
        state = mapping(read_object(content)["state"])
        return whole(state["workers"]) > 0 and abs(now - number(state["at"])) < SCALER_SECONDS
    except (ValueError, LookupError):
        return False


def _read(entries: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entries.items():
        with suppress(ValueError):  # not written by a worker of ours
            found[name.decode()] = read_object(value)
    return found


def _until(facts: Any) -> float:
    try:
        return number(facts["until"])
    except (LookupError, ValueError):
        return 0.0


def _pool_queue(entry: Any) -> str:
    """The queue of an announced pool; empty where none is known."""
    try:
        return str(entry["pool"]["queue"])
    except (LookupError, TypeError):
        return ""
