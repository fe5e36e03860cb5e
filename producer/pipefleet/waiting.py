"""What a job waits for when nobody serves its queue: one sentence that tells the cause and the next step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipefleet import broker
from pipefleet.fleet import model_label
from pipefleet.routing import PREFIX

if TYPE_CHECKING:
    from redis import Redis

WORKERS_KEY = f"{broker.KEY}workers"
SCALER_KEY = f"{broker.KEY}scaler:"
SCALER_SECONDS = 120.0
"""How old what the scaler decided may be."""


def why_waiting(redis: Redis, queue: str) -> str | None:
    """One sentence when no live worker serves `queue`; None when one does. Raises redis-py's errors; two round trips at most."""
    pipe = redis.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(WORKERS_KEY)
    pipe.hgetall(broker.POOLS_KEY)
    (seconds, micros), workers, pools = pipe.execute()
    now, entries = seconds + micros / 1e6, _read(pools)
    if queue in served_queues(_read(workers), entries, now):
        return None
    return _sentence(redis, queue, entries, now)


def served_queues(workers: Mapping[str, Any], pools: Mapping[str, Any], now: float) -> set[str]:
    """The queues that live workers consume: those that a worker names, else the queue of the pool that it names."""
    served: set[str] = set()
    for facts in workers.values():
        if _until(facts) <= now:
            continue
        named = facts.get("queues")
        served |= set(named) if isinstance(named, list) else {_pool_queue(pools.get(str(facts.get("pool"))))}
    return served


def _sentence(redis: Redis, queue: str, pools: Mapping[str, Any], now: float) -> str:
    name, model = _pool_of(queue, pools)
    depth = broker.depth(redis, queue)
    waiting = sum(depth[state] for state in ("high", "normal", "low", "delayed"))
    jobs = "1 job waits" if waiting == 1 else f"{waiting} jobs wait"
    served = queue + (f" (model {model})" if model else "")
    if _is_wanted(redis, name, now):
        return f"no worker serves {served} yet; the scaler has asked for one; {jobs}"
    start = f"`pipefleet worker --pool {name}`" if name else "`pipefleet up`"
    return f"no worker serves {served} now; start one with {start}; {jobs}"


def _pool_of(queue: str, pools: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Name and model of the pool behind a queue, from what was announced last, however old; from the queue's name else."""
    for name, entry in pools.items():
        fields = entry.get("pool", {}) if isinstance(entry, Mapping) else {}
        if isinstance(fields, Mapping) and fields.get("queue") == queue and fields.get("model"):
            return str(fields.get("name", name)), model_label(str(fields["model"]), fields.get("revision"))
    _, _, pool = queue.removeprefix(PREFIX).partition("@")[0].partition(".")
    return pool or None, None


def _is_wanted(redis: Redis, pool: str | None, now: float) -> bool:
    """Whether a scaler decided a moment ago that the pool should have workers: one is starting then."""
    try:
        state = json.loads(redis.get(f"{SCALER_KEY}{pool}") or "")["state"]  # type: ignore[arg-type]
        return int(state["workers"]) > 0 and abs(now - float(state["at"])) < SCALER_SECONDS
    except (ValueError, LookupError, TypeError):
        return False


def _read(entries: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entries.items():
        try:
            found[name.decode()] = json.loads(value)
        except ValueError:
            continue  # not written by a worker of ours
    return found


def _until(facts: Any) -> float:
    try:
        return float(facts["until"])
    except (LookupError, TypeError, ValueError):
        return 0.0


def _pool_queue(entry: Any) -> str:
    """The queue of an announced pool; empty where none is known."""
    try:
        return str(entry["pool"]["queue"])
    except (LookupError, TypeError):
        return ""
