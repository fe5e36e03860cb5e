"""Celery's side of a worker: a task whose Strategy hands each message to the consumer instead of a pool.

    Celery's event loop ─▶ Strategy ─▶ CeleryDelivery ─▶ Consumer.take        Consumer ends it ─▶ `_soon` ─▶ event loop

Requests keep the state that Celery's tools read: `inspect active` and `reserved`, and the events that Flower shows. Celery ends
revoked and expired messages by itself; here the consumer ends them, so that the job's record ends as well. A pool would cost a
thread hop and several times the time of a small job. A malformed message raises InvalidTaskError, which Celery handles.
"""

from __future__ import annotations

import html
import itertools
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from celery import Task, bootsteps, signals
from celery.exceptions import InvalidTaskError
from celery.utils.imports import symbol_by_name
from celery.worker import state
from celery.worker.request import Request, create_request_cls

from pipefleet.contract.messages import JobState, is_id
from pipefleet.queues.celery import TIME_HEADER
from pipefleet.queues.dead_letters import kills
from pipefleet.queues.keys import queue_list
from pipefleet_workers.consume.consumer import Consumer
from pipefleet_workers.delivery.audience import audience_of
from pipefleet_workers.delivery.envelope import check_message
from pipefleet_workers.delivery.headers import MalformedError, checked_headers
from pipefleet_workers.delivery.leases import Lease, lease_of
from pipefleet_workers.ending import REVOKED, Ending

log = logging.getLogger(__name__)
Refused = Callable[[Any, str], None]
"""A thread of the consumer calls it with the payload of a refused message and the reason."""
MOST_REVOKED = 50_000
"""How many revoked ids are remembered, as many as Celery remembers.

Also how many put-off ids, so that `revoke` ends them at once.
"""
SHORT_WAIT = 1.0
"""A message that is due within these seconds keeps its place here; a message that is due later waits in Redis."""


class InferRequest(Request):  # type: ignore[misc]
    """A request that Celery cannot end by itself: the consumer gets Celery's orders to end it."""

    def maybe_expire(self) -> bool:
        """Always False: the consumer knows the time too, and ends the job as expired."""
        return False

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Revoke the job; no process exists that could be ended for it."""
        self.task.revoke([self.id])

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Do nothing: at a cold shutdown the job goes back with its lease."""

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """Do nothing: the event is sent when the job has ended."""


class InferTask(Task):  # type: ignore[misc]
    """The one task of a worker. Set `consumer` and `refused` before the worker starts."""

    acks_late = True
    typing = False
    ignore_result = True
    Request = InferRequest
    consumer: Consumer
    refused: Refused
    clock: Callable[[], float] = staticmethod(time.time)
    """Seconds since 1970 on the clock of messages; a worker sets the Redis server's clock.

    Runs in the event loop, so it must not do I/O.
    """
    celery_consumer: Any = None
    """Celery's own consumer, once it runs."""

    def __init__(self) -> None:
        self.steps = Steps()
        self._revoked_at: dict[str, float] = {}
        """When each id was revoked, by `clock`; the oldest first."""
        self._put_off: dict[str, Lease] = {}

    def Strategy(self, task: Any, app: Any, celery: Any) -> Callable[..., None]:
        """The handler of this task's messages, for one run of Celery's consumer."""
        self.celery_consumer = celery
        if self.take_or_not not in self.consumer.health.watchers:
            self.consumer.health.watchers.append(self.take_or_not)
        self.steps.of(celery)
        request_class = create_request_cls(
            symbol_by_name(task.Request), task, celery.pool, celery.hostname, celery.event_dispatcher, app=app
        )

        def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **_: Any) -> None:
            if lease_of(message) is None:
                _check(message, self.clock)
            if not is_id((message.headers or {}).get("id")):  # Celery before 4 wrote no id into the headers
                raise InvalidTaskError("the message names no id in its headers that a job may have")
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
            # Celery keeps a counter for each name for ever, so a message must not choose the name.
            request.name = task.name
            delivery = CeleryDelivery(request, celery, self)
            delivery.revoked = self.is_revoked(request)
            wait = _seconds_until(request, self.clock() if delivery.lease is None else delivery.lease.taken_at)
            if wait > SHORT_WAIT and delivery.lease is not None and not delivery.revoked:
                return self._wait_in_redis(delivery, delivery.lease, wait)
            delivery.received()
            if self.consumer.barred is not None:
                self.take_or_not(self.consumer.barred)  # Celery has reconnected, and takes messages again
            self.consumer.take(delivery, after=wait)

        return handle

    def _wait_in_redis(self, delivery: CeleryDelivery, lease: Lease, seconds: float) -> None:
        """Let a message wait in Redis, beside its queue. There it takes no place of the prefetch."""
        self._put_off.pop(delivery.id, None)
        self._put_off[delivery.id] = lease
        if len(self._put_off) > MOST_REVOKED:
            del self._put_off[next(iter(self._put_off))]
        delivery.announce()
        lease.put_off(seconds)

    def revoke(self, ids: Iterable[str]) -> None:
        """End the jobs with these ids, here or when they come later. Called in the event loop; returns at once."""
        known, now = self._revoked_at, self.clock()
        for one in ids:
            known.pop(one, None)
            known[one] = now
            self.consumer.revoke(one, now)
            if (lease := self._put_off.pop(one, None)) is not None:
                lease.due_now()
        for oldest in list(itertools.islice(known, max(0, len(known) - MOST_REVOKED))):
            del known[oldest]

    def is_revoked(self, request: Any) -> bool:
        """Whether a message was revoked, by id or by stamp. A message that was queued after its id was revoked is wanted again."""
        at = self._revoked_at.get(request.id)
        if at is None:
            return bool(request.stamped_headers) and bool(request.revoked())
        queued = request.message.headers.get(TIME_HEADER)
        return not isinstance(queued, int | float) or queued <= at

    def take_or_not(self, barred: str | None) -> None:
        """Let Celery take messages, or no messages while the worker is barred. Called by any thread."""
        celery = self.celery_consumer
        if celery is not None:
            celery.call_soon(lambda: self._obey(celery))

    def _obey(self, celery: Any) -> None:
        """In the event loop: take messages, or take none. May be repeated."""
        if celery.task_consumer is None:
            return  # the connection is lost; after the next connection `Strategy` calls this again
        if self.consumer.barred is None:
            celery.task_consumer.consume()
        else:
            celery.task_consumer.cancel()

    def died(self, job_id: str, reason: str) -> None:
        """Send Celery's event that a job failed: its workers died, so the job is a dead letter, and none of them can report it.

        Called by any thread.
        """
        celery = self.celery_consumer
        if celery is not None:
            celery.call_soon(lambda: send(celery, "task-failed", job_id, exception=html.escape(reason), traceback=""))


class Steps:
    """What Celery's event loop has to do for deliveries, in order. Any thread adds steps; the loop does them.

    One callback of the loop does all steps that wait: a callback for each, and a wake-up for each, costs far more than most steps.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, str, Callable[[], None]]] = deque()
        self._asked = False

    def of(self, celery: Any) -> None:
        """Do the waiting steps at every turn of the loop of Celery's consumer. May be repeated."""
        if getattr(celery, "hub", None) is not None:
            celery.hub.on_tick.add(self.do)

    def add(self, celery: Any, job_id: str, step: Callable[[], None], *, wake: bool = True) -> None:
        """Let the loop do a step. Unless it should `wake`, the step waits for the loop's next turn, a second at most."""
        self._waiting.append((celery, job_id, step))
        if wake and not self._asked:
            self._asked = True
            celery.call_soon(self.do)

    def do(self) -> None:
        """Do all steps that wait. In the event loop."""
        self._asked = False
        while self._waiting:
            celery, job_id, step = self._waiting.popleft()
            try:
                step()
            except celery.connection_errors:
                raise  # Celery connects again, and does the other steps after that
            except Exception:  # an error in Celery's books of one message must not end the worker
                log.exception("what Celery is told of message %s failed", job_id)


class CeleryDelivery:
    """A Delivery whose message came through Celery. Steps that touch Celery's state run in the thread of its event loop."""

    def __init__(self, request: Any, celery: Any, task: InferTask) -> None:
        self._request = request
        self._celery = celery
        self._task = task
        self._accepted = False
        self._ready = False
        self.begun = self._begun_at = 0.0
        headers, properties = request.message.headers, request.message.properties
        self.id: str = request.id
        self.trace = headers if "traceparent" in headers else None
        self.lease = lease_of(request.message)
        args = request.args
        self.payload = args[0] if isinstance(args, list) and len(args) == 1 else args
        priority = properties.get("priority")
        self.priority = priority if isinstance(priority, int) else 3
        self.deliveries = self.lease.deliveries if self.lease is not None else 1
        self.retries = 0
        self.revoked = False
        self.deadline: float | None = request.expires.timestamp() if request.expires else None

    @property
    def lost(self) -> bool:
        """True when the lease ran out."""
        return self.lease is not None and self.lease.lost

    def received(self) -> None:
        """Tell Celery that the message is here. In the event loop."""
        state.task_reserved(self._request)
        self.announce()

    def announce(self) -> None:
        """Send the event that the message was received; Celery's books do not change. In the event loop."""
        request = self._request
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

    def started(self, *, quick: bool = False) -> None:
        """Tell Celery that work begins; only the first call counts."""
        if not self.begun:
            self.begun, self._begun_at = time.monotonic(), time.time()
            self._soon(self._accept, wake=not quick)

    def done(self, ending: Ending) -> None:
        """Acknowledge the message."""
        if self.lease is not None:
            self.lease.ack()  # at once, from this thread, since the event loop may be waiting for the drain
        self._soon(lambda: self._finish(ending))

    def give_back(self, delay: float = 0.0) -> None:
        """Put the message back to its place in the queue."""
        if delay and self.lease is not None:
            self.lease.give_back(delay)
        self._soon(self._hand_back)

    def hand_over(self, queue: str) -> None:
        """Move the message to another queue."""
        if self.lease is not None:
            self.lease.hand_over(queue, queue_list(queue, self.priority))
        self._soon(lambda: self._move(queue))

    def refuse(self, reason: str) -> None:
        """Move the message to the dead letters, after telling the waiting client.

        Asks Redis, so never call it in the event loop.
        """
        self._task.refused(self.payload, reason)
        if self.lease is not None:
            self.lease.dead_letter(reason)
        self._soon(lambda: self._refuse(reason))

    def _soon(self, step: Callable[[], None], *, wake: bool = True) -> None:
        """Let the event loop do a step after all earlier steps."""
        self._task.steps.add(self._celery, self.id, step, wake=wake)

    def _accept(self) -> None:
        if self._ready or self._accepted:
            return  # the job was revoked before this step
        self._accepted = True
        self._request.time_start, self._request.worker_pid = self._begun_at, os.getpid()
        state.task_accepted(self._request)
        self._send("task-started", timestamp=self._begun_at)

    def _finish(self, ending: Ending) -> None:
        self._leave()
        if self.lease is None:
            self._request.acknowledge()
        seconds = time.monotonic() - self.begun if self.begun else 0.0
        match ending.state:
            case JobState.SUCCEEDED:
                self._send("task-succeeded", result=html.escape(ending.text), runtime=seconds)
            case JobState.FAILED:
                self._send("task-failed", exception=html.escape(ending.text), traceback="")
            case JobState.CANCELLED:
                self._send("task-revoked", terminated=True, signum=None, expired=False)
            case JobState.EXPIRED:
                self._send("task-revoked", terminated=False, signum=None, expired=True)

    def _hand_back(self) -> None:
        self._leave()
        self._request.reject(requeue=True)

    def _move(self, queue: str) -> None:
        if self.lease is not None:
            return self._hand_back()  # the lease has ended already; this closes Celery's own books
        self._task.app.send_task(
            self._request.name, [self.payload], task_id=self._request.id, queue=queue, priority=self.priority
        )
        self._leave()
        self._request.acknowledge()

    def _refuse(self, reason: str) -> None:
        self._leave()
        if self.lease is None:
            self._request.reject(requeue=False)
        if reason == REVOKED:
            self._send("task-revoked", terminated=True, signum=None, expired=False)
        elif not kills(reason):  # the dead letter of a killed worker is announced by `InferTask.died`
            self._send("task-failed", exception=html.escape(reason), traceback="")

    def _leave(self) -> None:
        self._ready = True
        state.task_ready(self._request)

    def _send(self, event: str, **fields: Any) -> None:
        send(self._celery, event, self._request.id, **fields)


def register_alone(app: Any, task: InferTask) -> None:
    """Make `task` the only task of workers of `app`. Celery's own tasks would send further messages and delete results."""
    app.finalize()
    app.register_task(task)
    for name in [name for name in app.tasks if name != task.name]:
        app.tasks.unregister(name)


def _check(message: Any, clock: Callable[[], float]) -> None:
    """Check a message of Celery's own transport; our transport checks its messages before Celery sees them.

    Raises InvalidTaskError.
    """
    try:
        message.headers = checked_headers(message.headers, clock)
        check_message(message)
    except MalformedError as error:
        raise InvalidTaskError(str(error)) from None


def _seconds_until(request: Any, now: float) -> float:
    """Seconds until a request may begin, or until it expires if it expires earlier; at most 0 without an eta.

    Raises OverflowError and ValueError.
    """
    if not request.eta:
        return 0.0
    times = [one.timestamp() for one in (request.eta, request.expires) if one]
    return float(min(times) - now)


def send(celery: Any, event: str, job_id: str, **fields: Any) -> None:
    """Send one of Celery's events, unless nobody hears it. In the event loop."""
    eventer = celery.event_dispatcher
    if eventer and eventer.enabled:
        audience = audience_of(eventer)
        if audience is None or not audience.absent:
            eventer.send(event, uuid=job_id, **fields)


def drain_step(consumer: Consumer, seconds: float) -> type[bootsteps.StartStopStep]:
    """A step of Celery's consumer that drains our consumer when the worker shuts down, before the connection closes.

    A second SIGTERM ends the waiting, even one that comes before the waiting begins.
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
                return  # only the connection is lost, and work goes on
            before = signal.signal(signal.SIGTERM, lambda *_: hurry.set())
            try:
                consumer.drain(seconds, hurry)
            finally:
                signal.signal(signal.SIGTERM, before)
            _run_ready(celery)

    return Drain


def _run_ready(celery: Any) -> None:
    """Run the steps that still wait for the ended event loop, and all steps that these add. Acknowledgements are among them."""
    for _ in range(8):
        ready = celery.hub._pop_ready() if celery.hub else ()
        if not ready:
            return
        for call in ready:
            call()
