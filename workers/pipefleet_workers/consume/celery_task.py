"""Celery's side of a worker: a task whose Strategy hands each message to the consumer instead of a pool.

Requests keep what Celery's tools look at: `inspect active` and `reserved`, revocation, expiry, and the events that Flower shows.
A pool would cost a thread hop and several times the time of a small job.
"""

from __future__ import annotations

import itertools
import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import Task, bootsteps, signals
from celery.utils.imports import symbol_by_name
from celery.worker import state
from celery.worker.request import create_request_cls
from kombu.asynchronous.timer import to_timestamp

from pipefleet import broker
from pipefleet_workers.consume.consumer import Consumer
from pipefleet_workers.delivery.leases import lease_of

log = logging.getLogger(__name__)
Refused = Callable[[Any, str], None]
"""Called with the payload of a message that is refused, and the reason."""


class InferTask(Task):  # type: ignore[misc]
    """The one task of a worker. Set `consumer` and `refused` before the worker starts."""

    acks_late = True
    typing = False
    ignore_result = True
    consumer: Consumer
    refused: Refused

    def Strategy(self, task: Any, app: Any, celery: Any) -> Callable[..., None]:
        """The handler of this task's messages, for one run of Celery's consumer."""
        request_class = create_request_cls(
            symbol_by_name(task.Request), task, celery.pool, celery.hostname, celery.event_dispatcher, app=app
        )

        def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
            request = request_class(
                message,
                on_ack=ack,
                on_reject=reject,
                app=app,
                hostname=celery.hostname,
                eventer=celery.event_dispatcher,
                task=task,
                connection_errors=celery.connection_errors,
                body=message.body,
                headers=message.headers,
                decoded=False,
                utc=app.uses_utc_timezone(),
            )
            if (request.expires or request.id in state.revoked) and request.revoked():
                return
            delivery = CeleryDelivery(request, celery, self)
            delivery.received()
            if request.eta:
                celery.timer.call_at(to_timestamp(request.eta), self.consumer.take, (delivery,))
            else:
                self.consumer.take(delivery)

        return handle


class CeleryDelivery:
    """A Delivery whose message came through Celery. What touches Celery's state runs in the thread of its event loop."""

    def __init__(self, request: Any, celery: Any, task: InferTask) -> None:
        self._request = request
        self._celery = celery
        self._task = task
        self.begun = 0.0
        self._ended = threading.Lock()
        headers, properties = request.message.headers, request.message.properties
        self.trace = headers if "traceparent" in headers else None
        self.lease = lease_of(request.message)
        args = request.args
        self.payload = args[0] if isinstance(args, list) and len(args) == 1 else args
        priority = properties.get("priority")
        self.priority = priority if isinstance(priority, int) else 3
        self.deliveries = int(headers.get("x-delivery-count") or 1)
        self.retries = 0

    @property
    def lost(self) -> bool:
        """True when the lease ran out."""
        return self.lease is not None and self.lease.lost

    def received(self) -> None:
        """Tell Celery that the message is here. In the event loop."""
        request = self._request
        state.task_reserved(request)
        self._send(
            "task-received",
            name=request.name,
            args=request.argsrepr,
            kwargs=request.kwargsrepr,
            root_id=request.root_id,
            parent_id=request.parent_id,
            retries=request.request_dict.get("retries", 0),
            eta=request.eta and request.eta.isoformat(),
            expires=request.expires and request.expires.isoformat(),
        )

    def started(self) -> None:
        """Tell Celery that work begins."""
        self.begun = time.monotonic()
        self._celery.call_soon(self._accept)

    def done(self, state_reached: str) -> None:
        """Acknowledge."""
        if self.lease is not None:
            self.lease.ack()  # at once, from this thread; the event loop may be waiting for the drain
        self._end(lambda: self._finish(state_reached))

    def give_back(self) -> None:
        """Put the message back to its place in the queue."""
        self._end(lambda: self._reject(requeue=True))

    def hand_over(self, queue: str) -> None:
        """Move the message to another queue."""
        if self.lease is not None:
            self.lease.hand_over(queue, broker.queue_list(queue, self.priority))
        self._end(lambda: self._move(queue))

    def refuse(self, reason: str) -> None:
        """Put the message to the dead letters."""
        self._end(lambda: self._refuse(reason))

    def _end(self, how: Callable[[], None]) -> None:
        if not self._ended.acquire(blocking=False):
            return
        self._celery.call_soon(how)
        self._task.consumer.ended()

    def _accept(self) -> None:
        state.task_accepted(self._request)
        self._send("task-started")

    def _finish(self, reached: str) -> None:
        state.task_ready(self._request)
        self._request.acknowledge()
        seconds = time.monotonic() - self.begun if self.begun else 0.0
        self._send("task-succeeded", result=reached, runtime=seconds)

    def _reject(self, *, requeue: bool) -> None:
        state.task_ready(self._request)
        self._request.reject(requeue=requeue)

    def _move(self, queue: str) -> None:
        if self.lease is not None:
            return self._reject(requeue=True)  # the lease has ended; this closes Celery's own books
        self._task.app.send_task(
            self._request.name, [self.payload], task_id=self._request.id, queue=queue, priority=self.priority
        )
        state.task_ready(self._request)
        self._request.acknowledge()

    def _refuse(self, reason: str) -> None:
        state.task_ready(self._request)
        self._send("task-failed", exception=reason, traceback="")
        self._task.refused(self.payload, reason)
        if self.lease is None:
            self._request.reject(requeue=False)
        else:
            self.lease.dead_letter(reason)

    def _send(self, event: str, **fields: Any) -> None:
        eventer = self._celery.event_dispatcher
        if eventer and eventer.enabled:
            eventer.send(event, uuid=self._request.id, **fields)


def drain_step(consumer: Consumer, seconds: float) -> type[bootsteps.StartStopStep]:
    """A step of Celery's consumer that drains ours when the worker shuts down, before the connection closes.

    A second SIGTERM ends the waiting, also one that comes before the waiting begins.
    """
    hurry, asked = threading.Event(), itertools.count()

    def told(**_: Any) -> None:
        if next(asked):
            hurry.set()

    signals.worker_shutting_down.connect(told, weak=False)

    class Drain(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.consumer.connection:Connection",)

        def stop(self, celery: Any) -> None:
            if state.should_stop is None and state.should_terminate is None:
                return  # a lost connection: work goes on
            before = signal.signal(signal.SIGTERM, lambda *_: hurry.set())
            try:
                consumer.drain(seconds, hurry)
            finally:
                signal.signal(signal.SIGTERM, before)
            _run_ready(celery)

    return Drain


def _run_ready(celery: Any) -> None:
    """Run what waits for the event loop, which has ended, and what that brings up: acknowledgements among it."""
    for _ in range(8):
        ready = celery.hub._pop_ready() if celery.hub else ()
        if not ready:
            return
        for call in ready:
            call()
