"""From a job to its queue and back: pure functions of the job and the fleet.

pipefleet.<task>           the task's default pool
pipefleet.<task>.<pool>    every other pool
"""

from __future__ import annotations

from pipefleet.fleet import Fleet, Pool
from pipefleet.tasks import task_spec

PREFIX = "pipefleet."


def route(task: str, model: str | None, revision: str | None, fleet: Fleet) -> Pool:
    """The pool that a job goes to. Raises UnknownTaskError or UnknownModelError."""
    name = task_spec(task).name
    return fleet.default_pool(name) if model is None else fleet.find(name, model, revision)


def queue_name(pool: Pool, fleet: Fleet) -> str:
    """The queue that `pool`'s workers consume: what they announce, else what follows from the whole fleet."""
    if pool.queue is not None:
        return pool.queue
    shared = [other for other in fleet.pools.values() if other.task == pool.task]
    is_default = pool.default or len(shared) == 1
    return f"{PREFIX}{pool.task}" if is_default else f"{PREFIX}{pool.task}.{pool.name}"
