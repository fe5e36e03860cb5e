"""What `celery control` and Flower's buttons do to a worker whose jobs run in no pool. Replaces Celery's commands of these names.

revoke, terminate          end the job wherever it is, see `revocations`; both the same, since no process can be ended for one job
revoke_by_stamped_headers  Celery's own: jobs with the stamp that come from now on; with terminate, those that have begun as well
shutdown                   as SIGTERM: drains, where Celery's would drop what is held until the leases run out
rate_limit, time_limit     are answered and change nothing; no job is kept back or ended
add_consumer, cancel_consumer   another queue, or one less; what is held goes on. An error for a name that no queue here can have
pool_grow, pool_shrink, pool_restart, autoscale   an error is answered, since there is no pool; what is held goes on
objgraph, memsample, memdump, election   are not there: the first three load further modules or write files, the last asks others

Whoever may publish on the control channel steers the fleet; a producer may not, see deploy/redis/users.acl.
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
    """Put these commands in the place of Celery's, for every worker of this process. May be repeated."""
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
    """As `revoke`; the signal goes nowhere."""
    return revoke(panel, task_id, terminate=True)


def shutdown(panel: Any, msg: str = "", **_: Any) -> None:
    """End the worker as SIGTERM does."""
    signals.raise_signal(signals.SIGTERM)


def add_consumer(panel: Any, queue: Any, *args: Any, **options: Any) -> Any:
    """As Celery's, but for a name that could not be consumed, which would end the worker."""
    if not is_queue_name(queue):
        return {"error": "the name of a queue has no quotes, backslashes and control characters"}
    return _add_consumer(panel, queue, *args, **options)
