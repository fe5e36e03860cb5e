"""Every key of pipefleet in Redis: name, type, content, writer and lifetime; and the functions that make the names.

Other modules take the names from here. docs/architecture.md says which keys exist after each event, deploy/redis/users.acl who
may touch them. All keys begin with `pipefleet:`. First come jobs and runs. R is `Settings.result_ttl` (a day) and T is
`Settings.run_ttl` (14 days), both counted from the last write:

    job:<id>                hash    record of a single job (see `contract.records`); by clients and workers; ends after R
    text:<id>               stream  pieces of the text that a job writes (see `text_key`); by workers; ends after 10 minutes
    idempotency:<key>       string  id of the job with this key, and digest of its request; by clients; ends after R
    done:<client>           channel ids of a client's jobs that reached a final state, with records; by workers and clients
    cancelled               channel ids of jobs and runs that were cancelled; by clients
    run:<id>                hash    a run, fields below; by clients, read by workers; ends after T
    run:<id>:items          bitmap  items that have ended, by position; by workers, and clients that restore or seal; ends after T
    run:<id>:failed         bitmap  the ended items that failed; by the same; ends after T
    run:<id>:parts          bitmap  shards whose part is written, by index; by the same; ends after T
    run:<id>:refused        hash    shards without a part that no worker will run: the reason, by index; by workers; ends after T
    run:<id>:planner        string  items and shards that a live planner has queued; by the planner; ends after 10 s
    run:<id>:suspects:<index> hash  journal of a shard that killed workers: culprits, trying, openings; by workers; ends after T

The fields of `run:<id>`: `uri` and `since` (the mark: they are gone when Redis was emptied), `shards` and `items` (totals, once
planning has ended), `cancelled`, `unqueued` (missing shards that a client still has to queue), `moved` (content of moved.json),
`resumed` (word of the last time when refused shards were taken up).

The fleet. The hashes keep their entries until somebody removes them; an entry counts until the time in it:

    pools                   hash    pools and revisions that are served; by workers and `up --autoscale`; an entry counts for 30 s
    workers                 hash    facts of each live worker, by its name; by the worker; an entry counts for 30 s
    fleet                   string  id, URI and endpoint of the store (see `fleet.identity`); by whoever comes first; never ends
    revisions               hash    model and revision of each queue `<queue>@…`; by clients and workers; dropped after a week
    parked                  hash    pools whose workers `pipefleet up` starts no more, and why; by `up`; ends after 30 s
    work:<pool>             hash    running totals of a pool, or of a revision as `<pool>@<digits>`; by workers; never ends
    scaler:<pool>           string  state of the scaler for a pool or revision; by the scaler; ends after 2 h

The ledger of a pool: messages that are in no list, by delivery tag. All revisions of the pool share it. Workers write it; an entry
is removed when its message is acknowledged, buried or put back into its list; the keys have no time to live:

    unacked:<queue>         hash    the messages: Celery's own record of each
    unacked_index:<queue>   zset    when each was delivered or renewed last; for delayed messages, when they are due
    unacked_mutex:<queue>   string  lock of Celery's own transport; our transport never writes it; ends after 5 minutes
    deliveries:<queue>      hash    how often each was delivered; stays when a message is put back
    retries:<queue>         hash    how often each was given back with a delay; stays when a message is put back
    owners:<queue>          hash    who holds each: host, process, fetch, and since when
    delayed:<queue>         zset    messages that no worker holds, with the time when they go back to their list
    dead_unreported:<queue> list    dead letters of which nobody was told yet; by workers, which then move them to `dead`
    dead:<queue>            list    dead letters, newest first; kept until an operator requeues or removes them

The queues themselves are Celery's lists, without the prefix (see `pipefleet.fleet.routing` for `<queue>`):

- `<queue>` for priority 0, and `<queue>`, PRIORITY_SEPARATOR and 3, 6 or 9 for the others: messages that wait; clients push them,
  workers fetch them
- each of these with `:arriving` behind it: messages that woke an idle worker, for the milliseconds until it fetches them
- `_kombu.binding.<exchange>`: sets of Celery's, with the queues of each exchange; `<id>.reply.celery.pidbox`: lists of answers to
  `celery inspect`; the channels `/<db>.celery.pidbox` and `/<db>.celeryev/…`: Celery's commands and events
"""

from __future__ import annotations

PRIORITY_STEPS = (0, 3, 6, 9)
PRIORITY_SEPARATOR = "\x06\x16"
ARRIVING = ":arriving"
KEY = "pipefleet:"
CANCELLED_CHANNEL = f"{KEY}cancelled"
POOLS_KEY = f"{KEY}pools"
WORKERS_KEY = f"{KEY}workers"
PARKED_KEY = f"{KEY}parked"
FLEET_KEY = f"{KEY}fleet"
REVISIONS_KEY = f"{KEY}revisions"
REVISION_MARK = "@"
"""The mark in the name of a revision's queue: before it stands the queue of its pool."""


def job_key(job_id: str) -> str:
    """The hash of a single job."""
    return f"{KEY}job:{job_id}"


def text_key(job_id: str) -> str:
    """The Redis stream with the text of a job of which the client asked to read it while it is written.

    An entry has the fields `at` (characters before it) and `text`. The last entry has the field `end`.
    """
    return f"{KEY}text:{job_id}"


def run_key(run_id: str, part: str = "") -> str:
    """The hash of a run, or one of its bitmaps (`items`, `failed`, `parts`)."""
    return f"{KEY}run:{run_id}" + (f":{part}" if part else "")


def reply_channel(client_id: str) -> str:
    """The channel on which a client hears of its jobs."""
    return f"{KEY}done:{client_id}"


def idempotency_key(key: str) -> str:
    """The key that remembers the job of an idempotency key."""
    return f"{KEY}idempotency:{key}"


def work_key(name: str) -> str:
    """The hash with the running totals of a pool, or of one of its revisions."""
    return f"{KEY}work:{name}"


def scaler_key(pool: str) -> str:
    """The key with the scaler's state for a pool."""
    return f"{KEY}scaler:{pool}"


def queue_lists(queue: str) -> list[str]:
    """The Redis lists behind a queue, highest priority first."""
    return [queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS]


def arriving_lists(queue: str) -> list[str]:
    """For each of `queue_lists` its list of messages that woke a worker and are not fetched yet."""
    return [name + ARRIVING for name in queue_lists(queue)]


def queue_list(queue: str, priority: int) -> str:
    """The Redis list that jobs of one priority wait in."""
    step = max(step for step in PRIORITY_STEPS if step <= max(0, int(priority)))
    return queue_lists(queue)[PRIORITY_STEPS.index(step)]


def waiting_lists(queue: str) -> list[str]:
    """Every list in which messages of a queue wait: `queue_lists`, then `arriving_lists`, each with the highest priority first."""
    return [*queue_lists(queue), *arriving_lists(queue)]


def ledger_keys(queue: str) -> dict[str, str]:
    """The keys of a pool's ledger, as options of Celery's transport. Each pool has its own and never restores another's messages.

    The queues of a pool's revisions share the ledger: so the messages of a dead worker come back although its neighbours serve
    another revision. The first three keys are Celery's own; its stock transport does not touch the others.
    """
    queue = base_queue(queue)
    names = ("unacked", "unacked_index", "unacked_mutex", "deliveries", "retries", "owners", "delayed", "dead")
    keys = {f"{name}_key": f"{KEY}{name}:{queue}" for name in names}
    return {**keys, "unreported_key": f"{KEY}dead_unreported:{queue}"}


def base_queue(queue: str) -> str:
    """The queue of a pool, from the queue of one of its revisions."""
    return queue.partition(REVISION_MARK)[0]
