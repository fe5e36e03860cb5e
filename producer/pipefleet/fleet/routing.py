"""The queue of a job: functions of the job and the fleet, without I/O.

pipefleet.<task>           the queue of the task's default pool: messages without a model, from any Celery client
pipefleet.<task>.<pool>    the queue of any other pool
<either>@<8 hex digits>    the queue of one model and revision

A worker consumes the queue of its pool and the queue of its revision. So workers of two revisions of a pool serve side by side, and
a message for a revision waits for a worker of that revision. Clients call `route` and `work_queue`; workers announce the names.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.foreign import QUEUE_PREFIX
from pipefleet.tasks import task_spec

PREFIX = QUEUE_PREFIX


def route(task: str, model: str | None, revision: str | None, fleet: Fleet) -> Pool:
    """The pool that a job goes to. Raises UnknownTaskError or UnknownModelError."""
    name = task_spec(task).name
    if model is not None:
        return fleet.find(name, model, revision)
    pool = fleet.default_pool(name)  # of a local model, which has no revision, transformers passes over one as well
    return pool if revision is None or pool.revision is None else fleet.find(name, pool.model, revision)


def queue_name(pool: Pool, fleet: Fleet) -> str:
    """The queue of a pool, without a revision: the name that its workers announce, else the name that follows from the fleet."""
    if pool.queue is not None:
        return pool.queue
    shared = [other for other in fleet.pools.values() if other.task == pool.task]
    is_default = pool.default or len(shared) == 1
    return f"{PREFIX}{pool.task}" if is_default else f"{PREFIX}{pool.task}.{pool.name}"


@functools.lru_cache(maxsize=1024)
def revision_queue(queue: str, model: str, revision: str | None) -> str:
    """The queue of one revision, from the queue of its pool."""
    digest = hashlib.blake2b(json.dumps([model, revision]).encode(), digest_size=4).hexdigest()
    return f"{queue}@{digest}"


def work_queue(pool: Pool, fleet: Fleet) -> str:
    """The queue that producers send the jobs of `pool` to: the queue of its revision.

    If a worker of a release without queues of revisions announces the pool, it is the queue of the pool.
    """
    if pool.queue is not None:
        return pool.revision_queue or pool.queue
    return revision_queue(queue_name(pool, fleet), pool.model, pool.revision)


def announcement(pool: Pool, fleet: Fleet) -> dict[str, Any]:
    """The fields that workers announce of their pool. They suffice for routing."""
    queue = queue_name(pool, fleet)
    further = {"revision_queue": revision_queue(queue, pool.model, pool.revision), "retired": pool.generation > 0}
    return pool.to_json() | {"default": queue.count(".") == 1, "queue": queue} | further
