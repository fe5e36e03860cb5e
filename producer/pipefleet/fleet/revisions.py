"""The revisions of every pool in Redis: for each its waiting messages, its messages with workers, and its workers.

The revision of new work has the pool's own queue beside the revision's queue. Messages with workers lie in one ledger for the whole
pool; each tells the queue that it came from. `queues`, `top`, `doctor`, the scaler and `up` read with these functions, which raise
redis-py's errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipefleet.connection.reading import server_time
from pipefleet.connection.scripts import run_script
from pipefleet.connection.wrong_type import passed_over
from pipefleet.fleet.announcements import announced_workers, refused_places, workers_of
from pipefleet.fleet.pools import Fleet, Pool, model_label
from pipefleet.fleet.routing import PREFIX, queue_name, work_queue
from pipefleet.foreign import number, own_queue, read_object
from pipefleet.printable import printable
from pipefleet.queues.keys import REVISION_MARK, REVISIONS_KEY, base_queue, ledger_keys, waiting_lists
from pipefleet.queues.looking import by_priority
from pipefleet.queues.revision_notes import known_revisions

_HELD = r"""
if redis.acl_check_cmd and not redis.acl_check_cmd('HGETALL', ARGV[1]) then
  local delayed = redis.call('ZCARD', ARGV[2])
  return {'', math.max(0, redis.call('HLEN', ARGV[1]) - delayed), delayed}
end
local found, order = {}, {}
local all = redis.call('HGETALL', ARGV[1])
for i = 1, #all, 2 do
  local queue = string.match(string.sub(all[i + 1], -400), '"([^"\\]*)"%]$') or ''
  if not found[queue] then
    found[queue] = {0, 0}
    order[#order + 1] = queue
  end
  local place = redis.call('ZSCORE', ARGV[2], all[i]) and 2 or 1
  found[queue][place] = found[queue][place] + 1
end
local answer = {}
for _, queue in ipairs(order) do
  for _, value in ipairs({queue, found[queue][1], found[queue][2]}) do answer[#answer + 1] = value end
end
return answer
"""
"""ARGV: unacked and delayed of a pool. They are not KEYS, because KEYS need the right to write. Returns queue, held and delayed for
each queue. A user without the right to read messages learns only their number: all count under a queue without a name."""


@dataclass(frozen=True, slots=True)
class Held:
    """Numbers of messages that are in no list: `leased` by workers, and `delayed` for a while."""

    leased: int = 0
    delayed: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One revision of a pool, and the places of its messages."""

    pool: Pool
    queue: str
    """The queue that producers send its jobs to."""
    queues: tuple[str, ...]
    """Every queue that belongs to it."""
    held: Held | None = None
    """Its share of the pool's messages that are in no list; None for all of them."""
    named: bool = True
    """False for a revision that the fleet file does not name, or without a file no live worker."""

    @property
    def key(self) -> str:
        """`Pool.key`; for a revision that nobody names, the pool's name with the digits of its queue."""
        return self.pool.key if self.named else f"{self.pool.name}@{self.queue.partition(REVISION_MARK)[2]}"

    @property
    def work_key(self) -> str:
        """The name of its workers' totals, for `queues.keys.work_key`. The only revision of a pool has the totals of the pool."""
        return self.pool.name if self.held is None else f"{self.pool.name}@{self.queue.partition('@')[2]}"


def held_by_queue(redis: Any, queue: str) -> dict[str, Held]:
    """The messages of a pool that are with workers or delayed, by the queue that they came from."""
    keys = ledger_keys(queue)
    answer = run_script(redis, _HELD, [], keys["unacked_key"], keys["delayed_key"])
    triples = zip(answer[::3], answer[1::3], answer[2::3], strict=True)
    return {name.decode(errors="replace"): Held(int(leased), int(delayed)) for name, leased, delayed in triples}


def parts_of(redis: Any, fleet: Fleet, *, unnamed: bool = False, troubles: dict[str, str] | None = None) -> list[Part]:
    """Every revision of every pool of a fleet; with `unnamed` also the noted revisions that nobody names.

    With `troubles`, a pool with a key of another type is left out, and the reason is noted there.
    """
    known = known_revisions(redis)
    found: list[Part] = []
    for pool in fleet.pools.values():
        base = queue_name(pool, fleet)
        others = {name: one for name, one in known.items() if base_queue(name) == base}
        with passed_over(troubles, pool.key):
            found += _parts(redis, pool, fleet, others)
    return found if unnamed else [one for one in found if one.named]


def _parts(redis: Any, pool: Pool, fleet: Fleet, known: Mapping[str, tuple[str, str | None]]) -> list[Part]:
    base, own = queue_name(pool, fleet), work_queue(pool, fleet)
    retired = {work_queue(one, fleet): one for one in pool.previous}
    unnamed = {
        name: replace(pool, model=model, revision=revision, generation=len(retired) + 1, previous=())
        for name, (model, revision) in known.items()
        if name not in (base, own, *retired)
    }
    if not retired and not unnamed:
        return [Part(pool, own, (base, own))]
    held = held_by_queue(redis, base)
    rest = _sum(one for name, one in held.items() if name not in {**retired, **unnamed})
    first = Part(pool, own, (base, own), rest)
    named = [Part(one, name, (name,), held.get(name, Held())) for name, one in retired.items()]
    return [first, *named, *(Part(one, name, (name,), held.get(name, Held()), False) for name, one in unnamed.items())]


def _sum(held: Iterable[Held]) -> Held:
    both = list(held)
    return Held(sum(one.leased for one in both), sum(one.delayed for one in both))


@dataclass(frozen=True, slots=True)
class RevisionBacklog:
    """The backlog and the workers of one revision."""

    part: Part
    waiting: Mapping[str, int]
    """Messages by `high`, `normal` and `low` priority."""
    held: Held
    workers: int
    """Number of live workers that serve it."""
    first: Pool | None
    """The pool's revision of new work; None if nothing else is known of the pool."""
    barred: tuple[str, ...] = ()
    """The reasons of the workers that take no jobs because S3 refuses them."""
    refused: tuple[tuple[str, ...], ...] = ()
    """The refused buckets of each worker to which S3 refuses only some."""

    @property
    def note(self) -> str | None:
        """A sentence if nobody serves this although messages wait, or if some workers take no jobs; else None."""
        if self.barred:
            count = (
                "no worker takes"
                if len(self.barred) >= self.workers
                else f"{len(self.barred)} of {self.workers} workers take no"
            )
            return f"{count} jobs: {printable(self.barred[0], 400)}"
        if self.refused:
            buckets = ", ".join(sorted({f"s3://{one}/" for some in self.refused for one in some}))
            return (
                f"S3 refuses {printable(buckets, 400)} to {len(self.refused)} of {self.workers} workers; "
                "see what their policies allow"
            )
        if self.workers or not (sum(self.waiting.values()) or self.held.delayed):
            return None
        pool, label = self.part.pool, model_label(self.part.pool.model, self.part.pool.revision)
        if self.first is None:
            start = f"pipefleet worker --task {pool.task} {model_options(pool)}"
            return f"no worker serves {label} for {pool.task}; start one with `{start}`"
        text = f"no worker serves {label} for {pool.task}; start one with `{start_command(self.part)}`"
        if not pool.generation:
            return text
        return f"{text}, or move its runs with `pipefleet resume RUN_URI {model_options(self.first)}`"


def worker_command(pool: Pool) -> str:
    """The command that starts a worker for a revision, named by the fleet file or not. A pool without a name goes by its task."""
    start = f"pipefleet worker --pool {pool.name}" if pool.name else f"pipefleet worker --task {pool.task}"
    return f"{start} {model_options(pool)}" if pool.generation or not pool.name else start


def start_command(part: Part) -> str:
    """The command that starts a worker for a revision."""
    is_previous = part.named and part.pool.generation == 1
    return f"pipefleet worker --pool {part.pool.name} --previous" if is_previous else worker_command(part.pool)


def model_options(pool: Pool) -> str:
    """The options of a command that name the model and revision of a pool."""
    return f"--model {pool.model}" + (f" --revision {pool.revision}" if pool.revision else "")


def read_backlogs(redis: Any, fleet: Fleet, *, troubles: dict[str, str] | None = None) -> list[RevisionBacklog]:
    """The backlog of every revision of the fleet, and of others that have messages or workers.

    With `troubles`, a pool with a key of another type is left out, and the reason is noted there.
    """
    workers = announced_workers(redis)
    found = []
    for part in every_part(redis, fleet, troubles=troubles):
        waiting: Mapping[str, int] | None = None
        with passed_over(troubles, part.key):
            held = part.held or _all_held(redis, part.queue)
            waiting = _waiting_of(redis, part)
        if waiting is None:
            continue
        names = workers_of(workers, part.pool, part.queue)
        serving = len(names)
        barred = tuple(str(workers[name]["barred"]) for name in names if workers[name].get("barred"))
        refused = tuple(places for name in names if (places := tuple(refused_places(workers[name]))))
        if part.named or serving or sum(waiting.values()) or held != Held():
            found.append(
                RevisionBacklog(part, waiting, held, serving, fleet.pools.get(part.pool.name), barred, refused)
            )
    return found


def _waiting_of(redis: Any, part: Part) -> Mapping[str, int]:
    pipe = redis.pipeline(transaction=False)
    for name in (name for queue in part.queues for name in waiting_lists(queue)):
        pipe.llen(name)
    return by_priority(pipe.execute())


def every_part(redis: Any, fleet: Fleet, *, troubles: dict[str, str] | None = None) -> list[Part]:
    """Every revision of the fleet, and every other revision that Redis knows, with or without messages.

    With `troubles`, a pool with a key of another type is left out, and the reason is noted there.
    """
    return [*parts_of(redis, fleet, unnamed=True, troubles=troubles), *_forgotten(redis, fleet, troubles)]


def _all_held(redis: Any, queue: str) -> Held:
    keys = ledger_keys(queue)
    pipe = redis.pipeline(transaction=False)
    pipe.hlen(keys["unacked_key"])
    pipe.zcard(keys["delayed_key"])
    unacked, delayed = pipe.execute()
    return Held(max(0, unacked - delayed), delayed)


def waiting(redis: Any, queue: str) -> int:
    """The number of messages that wait for one revision, are with its workers, or are delayed: 0 once it is drained.

    `queue` is a `fleet.routing.work_queue`.
    """
    pipe = redis.pipeline(transaction=False)
    for name in waiting_lists(queue):
        pipe.llen(name)
    held = held_by_queue(redis, queue)
    own = _sum(held.get(name, Held()) for name in (queue, ""))
    return int(sum(pipe.execute())) + own.leased + own.delayed


def _forgotten(redis: Any, fleet: Fleet, troubles: dict[str, str] | None) -> list[Part]:
    """The noted queues of pools that no fleet file and no live worker names."""
    known = {queue_name(pool, fleet) for pool in fleet.pools.values()}
    found = []
    for name, (model, revision) in known_revisions(redis).items():
        base = base_queue(name)
        if base not in known:
            task, _, pool = base.removeprefix(PREFIX).partition(".")
            of = Pool(pool or task, task, model, revision, generation=1, queue=base, revision_queue=name)
            with passed_over(troubles, of.name):
                found.append(Part(of, name, (name,), held_by_queue(redis, name).get(name, Held()), named=False))
    return found


def forget_revisions(redis: Any, *, days: float = 7.0) -> None:
    """Forget the notes of queues that are empty, and that nobody sent to or consumed for `days` days.

    Notes of other names are forgotten too. A queue whose key holds another type is left: other commands tell of it.
    """
    entries: Any = redis.hgetall(REVISIONS_KEY)
    before = server_time(redis) - 86_400 * days if entries else 0.0
    for name, value in entries.items():
        with passed_over({}, ""):
            if _forgettable(redis, name, value, before):
                redis.hdel(REVISIONS_KEY, name)


def _forgettable(redis: Any, name: bytes, value: bytes, before: float) -> bool:
    try:
        lists = waiting_lists(own_queue(name.decode()))
    except ValueError:
        return True  # it must not be used as a key: the user may have no right to it
    try:
        old = number(read_object(value)["at"]) < before
    except (ValueError, LookupError):
        old = True
    return old and not any(redis.llen(one) for one in lists)
