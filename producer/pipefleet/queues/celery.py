"""Celery: the application, and the text of a job's message as Celery's Redis transport keeps it. Only this module imports celery.

A `JobMessage` comes in, a text for a Redis list goes out. Clients and planners queue with it; workers run the application.
ContractError says that a message is too large.
"""

from __future__ import annotations

import functools
import importlib
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipefleet.contract.messages import MAX_MESSAGE_BYTES, TASK_NAME, JobMessage, Priority, encode_json
from pipefleet.errors import ContractError
from pipefleet.queues.keys import PRIORITY_SEPARATOR, PRIORITY_STEPS, ledger_keys, queue_list
from pipefleet.queues.revision_notes import note_revision
from pipefleet.queues.trace_context import trace_headers
from pipefleet.settings import Settings
from pipefleet.settings.redis_urls import celery_url

if TYPE_CHECKING:
    from celery import Celery


COST_HEADER, TIME_HEADER = "pipefleet-cost", "pipefleet-at"
"""The cost of a message (see `JobMessage.work`), and when it was queued, in the server's seconds since 1970. Headers, so that
readers need not parse the body."""
SHARD_HEADER = "pipefleet-shard"
"""Messages with this header are delivered again without a bound: the consumer finds the item that is to blame."""


def celery_app(
    settings: Settings,
    *,
    queue: str | None = None,
    revision_queue: str | None = None,
    transport: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Celery:
    """The Celery application. With `queue` it consumes that queue and `revision_queue`, and uses the ledger of the queue's pool.

    `transport` names a transport to use in place of Celery's own for Redis; `options` are added to its options. With Celery's
    own, a dead worker's messages come back after `visibility_timeout` seconds.
    """
    from kombu import Exchange, Queue

    app = _celery()("pipefleet", broker=celery_url(settings.redis_url))
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_protocol=2,
        task_default_priority=int(Priority.NORMAL),
        task_send_sent_event=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options={
            "priority_steps": list(PRIORITY_STEPS),
            "sep": PRIORITY_SEPARATOR,
            "queue_order_strategy": "round_robin",  # among queues; a higher priority comes first in any case
            "visibility_timeout": 3600,
            **(ledger_keys(queue) if queue else {}),
            **(options or {}),
        },
    )
    if transport:
        app.conf.broker_transport = transport
    if queue:
        app.conf.task_queues = [Queue(queue)]
        if revision_queue:  # it needs an exchange of its own, or messages to the first queue would reach both
            further = Queue(revision_queue, Exchange(revision_queue), routing_key=revision_queue)
            app.conf.task_queues.append(further)
        app.conf.task_default_queue = queue
    return app


def _celery() -> type[Celery]:
    """Celery's class of applications; importing it takes long, so that is done when it is first needed.

    While the package is imported, it replaces itself in `sys.modules`. A thread that says `from celery import Celery` meanwhile may
    look into the replaced module, and find nothing. `import_module` waits, and then takes the present module.
    """
    found: type[Celery] = importlib.import_module("celery").Celery
    return found


@functools.cache
def _template() -> dict[str, Any]:
    """Headers and properties of a protocol 2 message as this Celery writes them. Made once; filled in for each job."""
    message = _celery()("pipefleet", set_as_current=False).amqp.as_task_v2(
        "", TASK_NAME, args=(), kwargs={}, argsrepr="", kwargsrepr="{}", ignore_result=True
    )
    return {"headers": dict(message.headers), "properties": dict(message.properties)}


def celery_message(job: JobMessage, queue: str, priority: Priority, *, now: float | None = None) -> str:
    """The JSON text of `job` that Celery's Redis transport keeps in a list.

    `now` is the time of queueing, in seconds since 1970 by the server's clock (default: by the local clock).
    Raises ContractError above MAX_MESSAGE_BYTES: larger inputs belong in the object store.
    """
    template = _template()
    body = encode_json([[job.to_json()], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    size = len(body.encode())
    if size > MAX_MESSAGE_BYTES:
        raise ContractError(f"a message of {size} bytes is above the bound of {MAX_MESSAGE_BYTES}")
    headers = {**template["headers"], "id": job.id, "root_id": job.id, "argsrepr": repr((job.task,))}
    headers.update({COST_HEADER: job.work, TIME_HEADER: time.time() if now is None else now, **trace_headers()})
    if job.shard is not None:
        headers[SHARD_HEADER] = True
    properties = {
        **template["properties"],
        "correlation_id": job.id,
        "delivery_mode": 2,
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue},
        "priority": int(priority),
        # Without body_encoding the body is plain JSON: readable with redis-cli, and a third smaller than base64.
    }
    return encode_json(
        {
            "body": body,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers,
            "properties": properties,
        }
    )


def push_job(pipe: Any, job: JobMessage, queue: str, priority: Priority, *, now: float | None = None) -> None:
    """Queue `job` in a redis pipeline; the caller executes it. `now` as in `celery_message`."""
    now = time.time() if now is None else now
    note_revision(pipe, queue, job.model, job.revision, now=now)
    pipe.lpush(queue_list(queue, priority), celery_message(job, queue, priority, now=now))
