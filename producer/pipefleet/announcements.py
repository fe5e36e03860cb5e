"""What workers tell the fleet of themselves, in two hashes of Redis: what can be had, by pool and revision, and who is alive.

Every entry ends by itself, `until` then, in the time of the Redis server: no worker's clock and no reader's counts. Entries that
cannot be read are passed over. Whoever announces needs no memory of Redis for it: the first write takes none (see `records`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipefleet.broker import KEY, reading
from pipefleet.contract import encode_json
from pipefleet.fleet import Fleet, Pool
from pipefleet.routing import revision_queue

POOLS_KEY = f"{KEY}pools"
WORKERS_KEY = f"{KEY}workers"

_CLOCK = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1000000
local function stamp(seconds) return string.format('%.6f', seconds) end
"""

_ANNOUNCE_POOL = (
    _CLOCK
    + """
local since, known = now, redis.call('HGET', KEYS[1], ARGV[1])
if known then
  local readable, entry = pcall(cjson.decode, known)
  if readable and type(entry) == 'table' and (tonumber(entry['until']) or 0) > now then
    since = tonumber(entry.since) or now
  end
end
redis.call('HDEL', KEYS[1], '')
redis.call('HSET', KEYS[1], ARGV[1],
  '{"pool":' .. ARGV[2] .. ',"until":' .. stamp(now + ARGV[3]) .. ',"since":' .. stamp(since) .. '}')
"""
)
"""KEYS: pools. ARGV: field, the pool as JSON, seconds. `since` stays while the entry is renewed before it ends."""

_ANNOUNCE_WORKER = (
    _CLOCK
    + """
redis.call('HDEL', KEYS[1], '')
redis.call('HSET', KEYS[1], ARGV[1],
  string.sub(ARGV[2], 1, -2) .. ',"at":' .. stamp(now) .. ',"until":' .. stamp(now + ARGV[3]) .. '}')
"""
)
"""KEYS: workers. ARGV: worker, its facts as a JSON object that is not empty, seconds."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A revision of a pool that somebody serves. Times in seconds since 1970 by the Redis server's clock."""

    pool: Pool
    since: float
    """When it was first announced, without a gap since; 0 from workers that do not tell."""
    until: float


def announce_pool(redis: Any, name: str, fields: Mapping[str, Any], *, seconds: float) -> None:
    """Announce what `routing.announcement` says of a pool for `seconds`; workers repeat this well before the time is over."""
    redis.eval(_ANNOUNCE_POOL, 1, POOLS_KEY, _field(name, fields), encode_json(dict(fields)), seconds)


def withdraw_pool(redis: Any, name: str, fields: Mapping[str, Any]) -> None:
    """Announce a revision no more, unless a worker of it is alive: one that is started later is new then, not a late neighbour."""
    alive = announced_workers(redis).values()
    if not any(facts.get("queue") == fields["revision_queue"] for facts in alive):
        redis.hdel(POOLS_KEY, *(_field(name, {**fields, "retired": retired}) for retired in (False, True)))


def _field(name: str, fields: Mapping[str, Any]) -> str:
    """One entry for each revision; another while it is being retired, so that it is new work's again once it is taken back."""
    key = revision_queue(name, fields["model"], fields.get("revision"))
    return f"{key}.retired" if fields.get("retired") else key


def announcements(redis: Any) -> list[Announcement]:
    """What is announced now, the newest first."""
    pipe = reading(redis)
    pipe.time()
    pipe.hgetall(POOLS_KEY)
    (seconds, micros), entries = pipe.execute()
    found = (_read_pool(name, value) for name, value in entries.items())
    now = seconds + micros / 1e6
    return sorted((one for one in found if one is not None and one.until > now), key=lambda one: -one.since)


def takes_new_work(redis: Any, pool: Pool) -> bool:
    """Whether this revision of a pool is announced as the one that new work goes to."""
    wanted = (pool.name, pool.model, pool.revision, 0)
    found = (one.pool for one in announcements(redis))
    return any((one.name, one.model, one.revision, one.generation) == wanted for one in found)


def _read_pool(name: bytes, value: bytes) -> Announcement | None:
    try:
        entry = json.loads(value)
        pool = Pool.announced(name.decode().partition("@")[0], entry["pool"])
        return Announcement(pool, float(entry.get("since") or 0.0), float(entry["until"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def announced_fleet(redis: Any) -> Fleet:
    """The fleet that workers announce: of the revisions of one pool, new work goes to the one that came last."""
    pools: dict[str, Pool] = {}
    for one in sorted(announcements(redis), key=lambda one: one.pool.generation):
        pool = one.pool
        if pool.name not in pools:
            pools[pool.name] = pool
            continue
        first = pools[pool.name]
        known = {(other.model, other.revision) for other in (first, *first.previous)}
        if (pool.model, pool.revision) not in known:
            retired = replace(pool, generation=len(first.previous) + 1 + first.generation)
            pools[pool.name] = replace(first, previous=(*first.previous, retired))
    return Fleet(pools)


def announce_worker(redis: Any, name: str, facts: Mapping[str, Any], *, seconds: float) -> None:
    """Tell that a worker lives, for `seconds`, with what it says of itself: not nothing."""
    redis.eval(_ANNOUNCE_WORKER, 1, WORKERS_KEY, name, encode_json(dict(facts)), seconds)


def announced_workers(redis: Any) -> dict[str, dict[str, Any]]:
    """What every worker that is alive tells of itself, by name, and its `age`: how many seconds ago it did. Changes nothing."""
    return {name: facts for name, facts in _workers(redis).items() if facts is not None}


def forget_dead_workers(redis: Any) -> None:
    """Remove the entries of workers that are gone, and those that cannot be read: for who has the right to it."""
    gone = [name for name, facts in _workers(redis).items() if facts is None]
    if gone:
        redis.hdel(WORKERS_KEY, *gone)


def _workers(redis: Any) -> dict[str, dict[str, Any] | None]:
    """The facts of every entry by name; None for one of a dead worker."""
    pipe = reading(redis)
    pipe.time()
    pipe.hgetall(WORKERS_KEY)
    (seconds, micros), entries = pipe.execute()
    now = seconds + micros / 1e6
    return {name.decode(errors="replace"): _read_worker(value, now) for name, value in entries.items()}


def _read_worker(value: bytes, now: float) -> dict[str, Any] | None:
    """The facts of a live worker; None of a dead one, and of an entry that cannot be read."""
    try:
        facts: dict[str, Any] = json.loads(value)
        at, until = float(facts.get("at") or now), float(facts["until"])
        return None if until < now or not isinstance(facts["pool"], str) else {**facts, "age": max(0.0, now - at)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def workers_of(workers: Mapping[str, Mapping[str, Any]], pool: Pool, queue: str) -> list[str]:
    """Which of these workers serve the revision of `pool` that `queue` (its `routing.work_queue`) is for, by name.

    The queue decides, since a worker that was started by hand may call its pool otherwise. Workers of a release that told no
    queue count for the revision that new work goes to.
    """
    silent = None if pool.generation else pool.name
    return [
        name
        for name, facts in workers.items()
        if facts.get("queue") == queue or (facts.get("queue") is None and facts["pool"] == silent)
    ]
