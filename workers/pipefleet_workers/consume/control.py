"""The commands of `celery control` and Flower's buttons, for a worker whose jobs run in no pool. They replace Celery's commands.

revoke, terminate          end the job wherever it is, see `revocations`; both do the same, since one job has no process of its own
revoke_by_stamped_headers  Celery's own: jobs with the stamp that come from now on; with terminate, also jobs that have begun
shutdown                   as SIGTERM: drains; Celery's command would drop the held messages until their leases run out
rate_limit, time_limit     answer, and change nothing; no job is kept back or ended
add_consumer, cancel_consumer   add or remove a queue; held jobs go on. An error for a name that no queue here can have
pool_grow, pool_shrink, pool_restart, autoscale   answer an error, since there is no pool; held jobs go on
objgraph, memsample, memdump, election   are removed: the first three load modules or write files, the last asks other workers

Celery's event loop calls these functions. Any program that may publish on the control channel steers the fleet. A producer may not,
see deploy/redis/users.acl.
"""

from __future__ import annotations

import signal as signals
from collections.abc import Iterable
from typing import Any

from celery.utils.functional import maybe_list
from celery.worker import control, state

from pipefleet.contract.messages import TASK_NAME
from pipefleet_workers.delivery.leases import is_queue_name

_add_consumer = control.add_consumer
REMOVED = ("objgraph", "memsample", "memdump", "election")


def install() -> None:
    """Replace Celery's commands with these, for every worker of this process. May be repeated."""
    for name in REMOVED:
        control.Panel.data.pop(name, None)
    for command in (revoke, terminate, shutdown, add_consumer):
        control.Panel.data[command.__name__] = command


def revoke(panel: Any, task_id: str | Iterable[str], terminate: bool = False, **_: Any) -> dict[str, str]:
    """Revoke jobs by id."""
    ids = [str(one) for one in maybe_list(task_id) or ()]
    state.revoked.update(ids)
    panel.app.tasks[TASK_NAME].revoke(ids)
    return {"ok": f"{'terminate' if terminate else 'revoked'}: {', '.join(ids)}"}


def terminate(panel: Any, signal: str, task_id: str | Iterable[str], **_: Any) -> dict[str, str]:
    """As `revoke`; the signal is ignored."""
    return revoke(panel, task_id, terminate=True)


def shutdown(panel: Any, msg: str = "", **_: Any) -> None:
    """End the worker as SIGTERM does."""
    signals.raise_signal(signals.SIGTERM)


def add_consumer(panel: Any, queue: Any, *args: Any, **options: Any) -> Any:
    """As Celery's command, but refuses a name that cannot be consumed; that name would end the worker."""
    if not is_queue_name(queue):
        return {"error": "the name of a queue has no quotes, backslashes and control characters"}
    return _add_consumer(panel, queue, *args, **options)
