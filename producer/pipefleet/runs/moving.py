"""Moving a run to another model or revision: the items that are not done yet run there.

`resume --model` calls `move_run`. plan.json and run.json stay unchanged; `_run/moved.json` names the model, revision and queue for
the rest of the run, and a field in Redis tells a planner that is still at work. Finished rows stay; each names its model.
AccessDeniedError says that the Redis user may not take messages out of queues.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.rights import may, require
from pipefleet.connection.scripts import run_script
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import encode_json
from pipefleet.errors import ObjectMissingError, UnknownModelError, UsageError
from pipefleet.fleet.announcements import announced_workers
from pipefleet.fleet.pools import UNNAMED, Pool, model_label
from pipefleet.fleet.revisions import worker_command
from pipefleet.fleet.routing import queue_name, work_queue
from pipefleet.foreign import name, read_object, readable
from pipefleet.queues.keys import base_queue, ledger_keys, run_key, waiting_lists
from pipefleet.queues.looking import message_id
from pipefleet.queues.revision_notes import queues_of
from pipefleet.runs.files import read_file
from pipefleet.storage.store import ObjectStore

if TYPE_CHECKING:
    from pipefleet.session import Session

MOVED = "moved"
"""The field of a run's hash in Redis with the content of moved.json."""
STALE_SECONDS = 6.0
"""Seconds without a renewal after which a lease belongs to a dead worker: live workers renew every four seconds."""

_TAKE = r"""
local t = redis.call('TIME')
local before, taken = t[1] + t[2] / 1000000 - ARGV[3], 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local tag, record = all[i], all[i + 1]
  local queue = string.match(string.sub(record, -400), '"([^"\\]*)"%]$')
  local ours = string.find(record, '"id":"' .. ARGV[2], 1, true)
  if ours and queue ~= ARGV[1] and (tonumber(redis.call('ZSCORE', KEYS[2], tag)) or 0) < before then
    for k = 2, #KEYS do
      redis.call(redis.call('TYPE', KEYS[k]).ok == 'zset' and 'ZREM' or 'HDEL', KEYS[k], tag)
    end
    redis.call('HDEL', KEYS[1], tag)
    taken = taken + 1
  end
end
return taken
"""
"""KEYS: unacked, its index, the other keys of a pool's ledger. ARGV: the queue whose messages stay, the prefix of the run's ids,
seconds. Removes the run's messages that dead workers hold; returns their number."""


@dataclass(frozen=True, slots=True)
class Moved:
    """The model, revision and queue that a run was moved to, and the queue of every pool that may still hold its messages."""

    model: str
    revision: str | None
    queue: str
    pools: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of moved.json."""
        return {"model": self.model, "revision": self.revision, "queue": self.queue, "pools": list(self.pools)}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Moved:
        """The reverse of `to_json`. Raises RunError, which names `where`, for any other value."""
        with readable(where):
            revision = None if value["revision"] is None else name(value["revision"])
            return cls(name(value["model"]), revision, name(value["queue"]), tuple(map(name, value["pools"])))

    def applied(self, plan: RunPlan) -> RunPlan:
        """The plan with the model, revision and queue of the move."""
        return replace(plan, model=self.model, revision=self.revision, queue=self.queue)


def read_moved(store: ObjectStore, layout: RunLayout) -> Moved | None:
    """The move of a run; None if it was not moved."""
    try:
        return Moved.from_json(read_file(store, layout.moved), layout.moved)
    except ObjectMissingError:
        return None


def moved_plan(session: Session, plan: RunPlan) -> RunPlan:
    """The plan after the moves of other clients, from Redis. A planner asks before every shard."""
    with redis_errors(session.settings.redis_url):
        found: Any = session.redis.hget(run_key(plan.id), MOVED)
    return moved_by(found, plan)


def moved_by(content: bytes | None, plan: RunPlan) -> RunPlan:
    """The plan after the move in `content`, the field MOVED of its run; the same plan if the field is empty."""
    if content is None:
        return plan
    where = f"the field {MOVED} of {run_key(plan.id)} in Redis"
    with readable(where):
        value = read_object(content)
    return Moved.from_json(value, where).applied(plan)


def move_run(session: Session, layout: RunLayout, plan: RunPlan, pool: Pool) -> RunPlan:
    """Note that the rest of a run goes to `pool`, and take its messages out of every other queue. Returns the moved plan.

    Raises AccessDeniedError, before anything is noted, if the Redis user may not take messages out.
    """
    with redis_errors(session.settings.redis_url):
        require(session.redis, "moving a run to another model", "operator", *_commands(plan.queue))
    before = read_moved(session.store, layout)
    queue = work_queue(pool, session.fleet)
    bases = (base_queue(one) for one in (*(before.pools if before else ()), plan.queue, queue))
    moved = Moved(pool.model, pool.revision, queue, tuple(dict.fromkeys(bases)))
    session.store.put(layout.moved, encode_json(moved.to_json()).encode())
    with redis_errors(session.settings.redis_url):
        session.redis.hset(run_key(plan.id), MOVED, encode_json(moved.to_json()))
        session.redis.expire(run_key(plan.id), int(session.settings.run_ttl))
    take_back(session, moved, plan.id)
    return moved.applied(plan)


def take_back(session: Session, moved: Moved, run_id: str) -> None:
    """Take the messages of a run out of every queue except the one that it was moved to.

    Messages that a live worker of another revision holds stay there and are done there. A user with only a producer's rights
    takes nothing out: the user who moved the run has done so.
    """
    with redis_errors(session.settings.redis_url):
        for base in moved.pools:
            if not may(session.redis, *_commands(base)):
                continue
            keys = ledger_keys(base)
            ledger = [keys[f"{name}_key"] for name in ("unacked", "unacked_index", "deliveries", "retries", "owners")]
            run_script(session.redis, _TAKE, ledger, moved.queue, f"{run_id}-", STALE_SECONDS)
            for queue in queues_of(session.redis, base):
                if queue != moved.queue:
                    _remove(session.redis, queue, run_id)


def _commands(queue: str) -> list[tuple[str, ...]]:
    """The commands that take messages out of a queue, for a check of rights."""
    ledger = ledger_keys(queue)["unacked_key"]
    return [("LRANGE", queue, "0", "-1"), ("LREM", queue, "-1", ""), ("HGETALL", ledger), ("HDEL", ledger, "")]


def _remove(redis: Any, queue: str, run_id: str) -> None:
    for waiting in waiting_lists(queue):
        while found := [raw for raw in redis.lrange(waiting, 0, -1) if _of_run(raw, run_id)]:
            pipe = redis.pipeline(transaction=False)
            for raw in found:
                pipe.lrem(waiting, -1, raw)
            if not sum(pipe.execute()):
                return  # workers took them meanwhile


def _of_run(raw: bytes, run_id: str) -> bool:
    return (message_id(raw) or "").startswith(f"{run_id}-")


def pool_of(session: Session, plan: RunPlan) -> Pool:
    """The pool of a run. If the fleet does not name its revision, or no longer, a pool that takes no new work stands for it."""
    fleet, base = session.fleet, base_queue(plan.queue)
    try:
        return fleet.find(plan.task, plan.model, plan.revision)
    except UnknownModelError:
        named = [one.name for one in fleet.pools.values() if queue_name(one, fleet) == base]
        return Pool(
            named[0] if named else "",
            plan.task,
            plan.model,
            plan.revision,
            generation=UNNAMED,
            queue=base,
            revision_queue=plan.queue,
        )


def known_pool(session: Session, plan: RunPlan) -> Pool | None:
    """As `pool_of`; None if the fleet file cannot be read. A run can do without it."""
    try:
        return pool_of(session, plan)
    except UsageError:
        return None


def unserved(session: Session, plan: RunPlan, uri: str) -> str | None:
    """One sentence with the next step if no worker serves the revision of a run; else None."""
    pool = pool_of(session, plan)
    queue = work_queue(pool, session.fleet)
    with redis_errors(session.settings.redis_url):
        workers = announced_workers(session.redis)
    if any(facts.get("queue") in (queue, plan.queue) for facts in workers.values()):
        return None
    label = model_label(plan.model, plan.revision)
    start = f"no worker serves {label} for {plan.task}, so this run waits; start one with `{worker_command(pool)}`"
    return f"{start}, or go on with a model that is served: `pipefleet resume {uri} --model MODEL`"
