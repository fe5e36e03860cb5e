"""Announcements in two Redis hashes: the pools and revisions that are served, and the facts of each live worker.

Workers announce, and repeat it every ten seconds. Clients without a fleet file, `queues`, `top` and the scaler read. An entry
counts until its field `until`, in the time of the Redis server, so nobody's own clock counts. Entries that cannot be read are
passed over, each with one warning of the logger `pipefleet`. A full server takes announcements too (see
`contract.records.NEEDS_NO_MEMORY`). All functions raise redis-py's errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipefleet.connection.reading import reading
from pipefleet.connection.scripts import run_script
from pipefleet.contract.messages import encode_json
from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.routing import revision_queue
from pipefleet.foreign import mapping, name, names, number, own_queue, passed, read_object
from pipefleet.queues.keys import POOLS_KEY, WORKERS_KEY

MOST_PLACES = 20
"""Most refused buckets that are read of one worker."""

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
"""KEYS: pools. ARGV: field, the pool as JSON, seconds. `since` stays the same while the entry is renewed before it ends."""

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
    """A revision of a pool that a worker serves. Times are in seconds since 1970 by the Redis server's clock."""

    pool: Pool
    since: float
    """The begin of an announcement without gaps; 0 from workers that do not tell it."""
    until: float


def announce_pool(redis: Any, name: str, fields: Mapping[str, Any], *, seconds: float) -> None:
    """Announce what `routing.announcement` says of a pool for `seconds`; workers repeat this well before the time is over."""
    run_script(redis, _ANNOUNCE_POOL, [POOLS_KEY], _field(name, fields), encode_json(dict(fields)), seconds)


def withdraw_pool(redis: Any, name: str, fields: Mapping[str, Any]) -> None:
    """Remove the announcement of a revision without live workers. So a worker that starts later counts as new."""
    alive = announced_workers(redis).values()
    if not any(facts.get("queue") == fields["revision_queue"] for facts in alive):
        redis.hdel(POOLS_KEY, *(_field(name, {**fields, "retired": retired}) for retired in (False, True)))


def _field(name: str, fields: Mapping[str, Any]) -> str:
    """The field of a revision. A retired revision has another field, so that it counts as new once it is no longer retired."""
    key = revision_queue(name, fields["model"], fields.get("revision"))
    return f"{key}.retired" if fields.get("retired") else key


def announcements(redis: Any) -> list[Announcement]:
    """The announcements that count now, newest first."""
    pipe = reading(redis)
    pipe.time()
    pipe.hgetall(POOLS_KEY)
    (seconds, micros), entries = pipe.execute()
    found = (read_pool(name, value) for name, value in entries.items())
    now = seconds + micros / 1e6
    return sorted((one for one in found if one is not None and one.until > now), key=lambda one: -one.since)


def takes_new_work(redis: Any, pool: Pool) -> bool:
    """Whether this revision of a pool is announced as the revision for new work."""
    wanted = (pool.name, pool.model, pool.revision, 0)
    found = (one.pool for one in announcements(redis))
    return any((one.name, one.model, one.revision, one.generation) == wanted for one in found)


def read_pool(field: bytes, value: bytes) -> Announcement | None:
    """An entry of POOLS_KEY; None, with one warning, for an entry that cannot be read."""
    try:
        entry = read_object(value)
        content = mapping(entry["pool"])
        known = names(content, "task", "model", "revision", "queue", "revision_queue")
        known |= {"task": name(content["task"]), "model": name(content["model"])}
        known |= {
            field: own_queue(content[field]) for field in ("queue", "revision_queue") if known.get(field) is not None
        }
        flags = {flag: content[flag] is True for flag in ("default", "retired") if flag in content}
        pool = Pool.announced(name(field.decode()).partition("@")[0], {**known, **flags})
        return Announcement(pool, number(entry.get("since") or 0.0), number(entry["until"]))
    except (ValueError, LookupError):
        passed.say(POOLS_KEY, field)
        return None


def announced_fleet(redis: Any) -> Fleet:
    """The fleet that workers announce. Of the revisions of one pool, new work goes to the one that came last."""
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
    run_script(redis, _ANNOUNCE_WORKER, [WORKERS_KEY], name, encode_json(dict(facts)), seconds)


def announced_workers(redis: Any) -> dict[str, dict[str, Any]]:
    """The facts of every live worker, by name, and their `age` in seconds. Changes nothing.

    Entries that cannot be read are warned of once and stay, for `pipefleet doctor` to list.
    """
    found, now = _workers(redis)
    return {
        field.decode(): {**facts, "age": max(0.0, now - (facts.get("at") or now))}
        for field, facts in found.items()
        if facts is not None and facts["until"] >= now
    }


def refused_places(facts: Mapping[str, Any]) -> list[str]:
    """The buckets that S3 refuses to this worker alone: jobs there go back for others."""
    told = facts.get("refused")
    return [str(one) for one in told[:MOST_PLACES]] if isinstance(told, list) else []


def forget_dead_workers(redis: Any) -> None:
    """Remove the entries of dead workers. Needs a worker's right."""
    found, now = _workers(redis)
    gone = [field for field, facts in found.items() if facts is not None and facts["until"] < now]
    if gone:
        redis.hdel(WORKERS_KEY, *gone)


def _workers(redis: Any) -> tuple[dict[bytes, dict[str, Any] | None], float]:
    """The facts of every entry, None for an unreadable entry; and the server's time."""
    pipe = reading(redis)
    pipe.time()
    pipe.hgetall(WORKERS_KEY)
    (seconds, micros), entries = pipe.execute()
    return {field: read_worker(field, value) for field, value in entries.items()}, seconds + micros / 1e6


_NUMBERS = ("items_per_second", "busy", "items", "failed", "max_cost", "at", "until")
_OPTIONAL_NUMBERS = ("base", "per_cost")


def read_worker(field: bytes, value: bytes) -> dict[str, Any] | None:
    """An entry of WORKERS_KEY, of a live or dead worker; None, with one warning, for an entry that cannot be read."""
    try:
        facts = dict(read_object(value))
        name(field.decode()), name(facts["pool"]), number(facts["until"])
        names(facts, "queue")
        for one in (*_NUMBERS, *_OPTIONAL_NUMBERS):
            if one in facts and not (facts[one] is None and one in _OPTIONAL_NUMBERS):
                facts[one] = _number(facts[one])
        return facts
    except (ValueError, LookupError):
        passed.say(WORKERS_KEY, field)
        return None


_ROUNDING = 1e-9
"""A number this close below 0 counts as 0: workers of earlier releases announce such numbers of their fits."""


def _number(value: Any) -> float:
    if isinstance(value, float) and -_ROUNDING < value < 0.0:
        return 0.0
    number(value)
    if not isinstance(value, int | float):
        raise ValueError("a text")
    return value


def workers_of(workers: Mapping[str, Mapping[str, Any]], pool: Pool, queue: str) -> list[str]:
    """The names of the workers that serve the revision of `pool` whose `fleet.routing.work_queue` is `queue`.

    The queue decides, because a worker that was started by hand may have another name for its pool. Workers of a release that
    announced no queue count for the revision of new work.
    """
    silent = None if pool.generation else pool.name
    return [
        name
        for name, facts in workers.items()
        if facts.get("queue") == queue or (facts.get("queue") is None and facts["pool"] == silent)
    ]
