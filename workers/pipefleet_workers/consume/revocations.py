"""`Revocations`: an operator's `revoke` (Flower's button) ends a job wherever it is, and tells the waiting client.

    single job   in its queue, prefetched, delayed or running: its record becomes `cancelled`, its work stops, then the ack
    shard        not begun: to the dead letters; running: its thread stops and drops its results, then to the dead letters

Celery alone would acknowledge the message and leave the job's record as it is. All this happens in a thread of its own: Redis may
be away, and then the job's end waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pipefleet.contract.messages import JobMessage, JobState, decode_message
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ContractError, PipefleetError
from pipefleet.service import Inbox, Service
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.held import Delivery, RevokedError
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.ending import REVOKED, Ending
from pipefleet_workers.results.reports import Reporter

log = logging.getLogger(__name__)
FAILURE = JobFailure("cancelled", REVOKED, "consume")
RETRY_SECONDS = 0.5


class Ends(Protocol):
    """Where deliveries end; of several calls for one delivery the first counts."""

    def done(self, delivery: Delivery, message: JobMessage, ending: Ending) -> None:
        """Acknowledge the message."""

    def give_back(self, delivery: Delivery) -> None:
        """Put the message back to its place in the queue."""

    def refuse(self, delivery: Delivery, reason: str) -> None:
        """Move the message to the dead letters."""

    def held(self, name: str) -> Sequence[Delivery]:
        """The deliveries with this name that are here."""

    def wait_no_more(self, delivery: Delivery) -> None:
        """Take the delivery out of those that begin later."""


@dataclass(frozen=True)
class Order:
    """One revocation. A delivery that comes afterwards was queued anew, and is wanted again."""

    deliveries: Sequence[Delivery]
    """The job's deliveries that were here at that moment; the record of a job without any is ended by its name."""
    name: str = ""
    at: float = 0.0
    """Seconds since 1970 on the clock of records."""


class Revocations:
    """Ends jobs that operators revoke. Thread-safe. Orders return at once; the service `carrying_out` carries the orders out."""

    def __init__(self, jobs: Jobs, reporter: Reporter, health: Health, ends: Ends, draining: threading.Event) -> None:
        self._jobs = jobs
        self._reporter = reporter
        self._health = health
        self._ends = ends
        self._draining = draining
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._orders: Inbox[Order] = Inbox()
        self.carrying_out = Service("revocations", self._run, wake=self._orders.wake)

    def order(self, name: str, at: float) -> None:
        """End a job by its name in Celery's tools. `at` is in seconds since 1970 on the clock of records."""
        self._orders.put(Order(self._ends.held(name), name, at))

    def order_delivery(self, delivery: Delivery) -> None:
        """End a delivery that was revoked before it came."""
        self._orders.put(Order([delivery]))

    def carry_out(self, order: Order) -> None:
        """End one job. Waits while Redis is away; gives the job back if the worker drains meanwhile."""
        for delivery in order.deliveries:
            self._ends.wait_no_more(delivery)
            self._end(delivery)
        if not order.deliveries:  # the job waits in its queue, or another worker has it
            self._patiently(lambda: self._reporter.revoke(order.name, FAILURE, order.at))

    def _run(self, stopping: threading.Event) -> None:
        for order in self._orders.each(stopping):
            try:
                self.carry_out(order)
            except Exception as error:
                log.exception("revoking a job failed")
                for delivery in order.deliveries:  # no other code ends them
                    self._ends.refuse(delivery, f"{REVOKED}, and its end cannot be told: {type(error).__name__}")

    @contextmanager
    def running(self, delivery: Delivery, message: JobMessage) -> Iterator[None]:
        """The shard runs inside. Raises RevokedError when it is revoked: at once, or wherever the shard waits."""
        with self._lock:
            if delivery.revoked:
                raise RevokedError
            self._running.add(id(delivery))
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(id(delivery))
                self._jobs.forget(message.id)

    def _end(self, delivery: Delivery) -> None:
        try:
            message = decode_message(delivery.payload)
        except ContractError as error:
            return self._ends.refuse(delivery, str(error))
        if message.shard is not None:
            return self._end_shard(delivery, message)
        delivery.revoked = True
        endings: list[Ending] = []
        self._patiently(lambda: endings.append(self._reporter.end(message, JobState.CANCELLED, FAILURE)))
        self._jobs.cancel(message.id)
        if endings:
            self._ends.done(delivery, message, endings[0])
        else:
            self._ends.give_back(delivery)

    def _end_shard(self, delivery: Delivery, message: JobMessage) -> None:
        with self._lock:
            delivery.revoked = True
            if id(delivery) in self._running:
                self._jobs.revoke(message.id)
                return  # the shard's thread refuses it, unless the part is written already
        self._ends.refuse(delivery, REVOKED)

    def _patiently(self, call: Callable[[], object]) -> None:
        """Repeat `call` until it succeeds, or the worker drains."""
        while True:
            try:
                call()
                return
            except PipefleetError as error:
                log.warning("a revoked job waits for its end: %s", error)
            self._health.check()
            self._health.wait()
            if self._draining.wait(RETRY_SECONDS):
                return
