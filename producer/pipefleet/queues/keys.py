"""Every key of pipefleet in Redis, by name; and Celery's lists behind a queue.

Keys, all under `pipefleet:` (queues are Celery's own lists, named in `pipefleet.fleet.routing`):

    job:<id>                hash    state, output, error … of a single job; kept for `Settings.result_ttl`
    done:<client>           channel the ids of a client's jobs that reached a final state
    cancelled               channel ids of jobs and runs that were cancelled
    idempotency:<key>       string  the id of the job that was submitted with this key, and a digest of what it asks for
    run:<id>                hash    shards, cancelled, since (a mark that is gone when Redis was emptied), unqueued (missing shards)
    run:<id>:items          bitmap  items that are finished, by position
    run:<id>:failed         bitmap  those of them that failed
    run:<id>:parts          bitmap  shards whose part is written
    run:<id>:refused        hash    shards without a part that no worker will run: why, by index
    run:<id>:planner        string  who plans or resumes the run now; ends with its heartbeat
    run:<id>:suspects:<index> hash  what is known of a shard that killed workers: culprits, and the item that runs alone now
    pools                   hash    what workers announce, by pool and revision; each entry ends with its heartbeat
    workers                 hash    what each worker tells of itself; ends with its heartbeat
    fleet                   string  the store that the fleet has, by its id; see `identity`
    revisions               hash    model and revision of each queue `<queue>@…` that messages were put into, or a worker consumes
    parked                  hash    pools whose workers `pipefleet up` starts no more, and why
    work:<pool>             hash    what a pool's workers have done, as running totals
    scaler:<pool>           string  what the scaler remembers of a pool

and of a pool's queue, shared by the queues of its revisions:

    unacked:<queue>         hash    delivered messages, by delivery tag: Celery's own record of them
    unacked_index:<queue>   zset    when each was delivered or renewed last; for delayed ones, when they are due
    deliveries:<queue>      hash    how often each was delivered
    retries:<queue>         hash    how often each was given back with a delay
    owners:<queue>          hash    who holds each: host, process, fetch, and since when
    delayed:<queue>         zset    those that no worker holds and that go back to their list when they are due
    dead:<queue>            list    dead letters, newest first
    dead_unreported:<queue> list    dead letters that nobody was told of yet

Beside each list of a queue lies `<list>:arriving`: messages that woke an idle worker, for the moment until it fetches them.
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
"""What stands in the name of a revision's queue between the queue of its pool and the rest."""


def job_key(job_id: str) -> str:
    """The hash of a single job."""
    return f"{KEY}job:{job_id}"


def run_key(run_id: str, part: str = "") -> str:
    """The hash of a run, or one of its bitmaps (`items`, `failed`, `parts`)."""
    return f"{KEY}run:{run_id}" + (f":{part}" if part else "")


def reply_channel(client_id: str) -> str:
    """The channel on which a client hears of its jobs."""
    return f"{KEY}done:{client_id}"


def idempotency_key(key: str) -> str:
    """Where the job of an idempotency key is remembered."""
    return f"{KEY}idempotency:{key}"


def work_key(name: str) -> str:
    """The hash with the running totals of a pool, or of one of its revisions."""
    return f"{KEY}work:{name}"


def scaler_key(pool: str) -> str:
    """What the scaler remembers of a pool."""
    return f"{KEY}scaler:{pool}"


def queue_lists(queue: str) -> list[str]:
    """The Redis lists behind a queue, highest priority first."""
    return [queue if step == 0 else f"{queue}{PRIORITY_SEPARATOR}{step}" for step in PRIORITY_STEPS]


def arriving_lists(queue: str) -> list[str]:
    """For each of `queue_lists` the list of those of its messages that woke a worker, which has not fetched them yet."""
    return [name + ARRIVING for name in queue_lists(queue)]


def queue_list(queue: str, priority: int) -> str:
    """The Redis list that jobs of one priority wait in."""
    step = max(step for step in PRIORITY_STEPS if step <= max(0, int(priority)))
    return queue_lists(queue)[PRIORITY_STEPS.index(step)]


def waiting_lists(queue: str) -> list[str]:
    """Every list in which messages of a queue wait: `queue_lists`, then `arriving_lists`, each with the highest priority first."""
    return [*queue_lists(queue), *arriving_lists(queue)]


def ledger_keys(queue: str) -> dict[str, str]:
    """The ledger of delivered messages as transport options, apart for each pool: one never restores another's.

    The queues of a pool's revisions share it, so what a dead worker left comes back whichever revision its neighbours serve.
    The first three are Celery's own; its stock transport leaves the others alone.
    """
    queue = base_queue(queue)
    names = ("unacked", "unacked_index", "unacked_mutex", "deliveries", "retries", "owners", "delayed", "dead")
    keys = {f"{name}_key": f"{KEY}{name}:{queue}" for name in names}
    return {**keys, "unreported_key": f"{KEY}dead_unreported:{queue}"}


def base_queue(queue: str) -> str:
    """The queue of a pool, from that of one of its revisions."""
    return queue.partition(REVISION_MARK)[0]
