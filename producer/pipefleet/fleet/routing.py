"""From a job to its queue and back: pure functions of the job and the fleet.

pipefleet.<task>           the task's default pool: messages that name no model, from any Celery client
pipefleet.<task>.<pool>    the same of every other pool
<either>@<8 hex digits>    the messages of one model and revision

Workers consume the queue of their pool and that of the revision they serve. So workers of two revisions of a pool serve side by
side, and what is queued for a revision waits for a worker of it.
"""

from __future__ import annotations

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
    """The queue of a pool, without a revision: what its workers announce, else what follows from the whole fleet."""
    if pool.queue is not None:
        return pool.queue
    shared = [other for other in fleet.pools.values() if other.task == pool.task]
    is_default = pool.default or len(shared) == 1
    return f"{PREFIX}{pool.task}" if is_default else f"{PREFIX}{pool.task}.{pool.name}"


def revision_queue(queue: str, model: str, revision: str | None) -> str:
    """The queue of one revision, from that of its pool."""
    digest = hashlib.blake2b(json.dumps([model, revision]).encode(), digest_size=4).hexdigest()
    return f"{queue}@{digest}"


def work_queue(pool: Pool, fleet: Fleet) -> str:
    """The queue that producers send the jobs of `pool` to: that of its revision.

    A worker of a release that knew no such queues announces that of its pool alone.
    """
    if pool.queue is not None:
        return pool.revision_queue or pool.queue
    return revision_queue(queue_name(pool, fleet), pool.model, pool.revision)


def announcement(pool: Pool, fleet: Fleet) -> dict[str, Any]:
    """What workers announce of their pool: enough to route by."""
    queue = queue_name(pool, fleet)
    further = {"revision_queue": revision_queue(queue, pool.model, pool.revision), "retired": pool.generation > 0}
    return pool.to_json() | {"default": queue.count(".") == 1, "queue": queue} | further
