"""`Consumer`: takes deliveries from the queue and ends each of them exactly once: done, given back, handed over, or refused.

    take ─┬▶ intake ─┬▶ singles            many jobs at once, no thread for each
          │          └▶ shards             a few threads
          ├▶ accused ─▶ suspects           alone: delivered so often that they may have killed their workers
          ├▶ later ───▶ one of these       not before their time
          └▶ revocations                   an operator does not want them

When S3 refuses every request of this worker, all its jobs go back for other workers, and it takes none until the refusal ends.
The head of `tries` says what becomes of one job that a service failed, and the head of `suspects` how the deliveries of a suspect
are counted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from pipefleet.contract.messages import JobMessage
from pipefleet.errors import (
    ContractError,
    PipefleetError,
    ServiceUnavailableError,
)
from pipefleet.queues.dead_letters import KILLED
from pipefleet.service import Inbox, Service, Services
from pipefleet_workers.consume.gate import Gate
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.held import Delivery, DrainedError, RevokedError, job_of
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.later import Later
from pipefleet_workers.consume.places import Places
from pipefleet_workers.consume.revocations import Revocations
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.singles import TOGETHER, Singles
from pipefleet_workers.consume.suspects import Suspects
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.consume.tries import IntakeLimits, Tries
from pipefleet_workers.ending import REVOKED, Ending
from pipefleet_workers.observe.logs import log_context
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import BarredError

log = logging.getLogger(__name__)
_Read = tuple[Delivery, JobMessage]
GATHER_SECONDS = 0.05
"""Suspects that come within these seconds of each other count as fetched together."""
RETRY_SECONDS = 0.5
"""Pause before a small step that a service failed is tried again."""


class Consumer:
    """Runs the jobs of one pool. The thread that reads the queue calls `take` and `revoke`; both return at once."""

    def __init__(
        self,
        jobs: Jobs,
        shards: Shards,
        suspects: Suspects,
        reporter: Reporter,
        health: Health,
        *,
        tally: Tally,
        limits: IntakeLimits | None = None,
        places: Places | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._shards = shards
        self._suspects = suspects
        self._reporter = reporter
        self._tally = tally
        self._limits = limits or IntakeLimits()
        self._draining = threading.Event()
        self._gate = Gate()
        self._singles = Singles(jobs, reporter, self._gate, self, tally, budget=self._limits.retries)
        self._revocations = Revocations(jobs, reporter, health, self, self._draining)
        self._bulk: Inbox[_Read] = Inbox()
        self._suspect: Inbox[_Read] = Inbox()
        self._accused: Inbox[Delivery] = Inbox()
        self._intake: Inbox[Delivery] = Inbox()
        self.later: Later[Delivery] = Later(clock)
        self._tries = Tries(
            self, self.later, health, self._revocations, self._draining, self._limits, places or Places()
        )
        self._changed = threading.Condition()
        self._held: dict[int, Delivery] = {}
        self._leaving = 0
        self.health = health
        health.watchers.append(self._bar)
        self._loops = self._services()

    @property
    def barred(self) -> str | None:
        """Why S3 refuses this worker; every delivery then goes back at once. None while S3 does not refuse it."""
        return self.health.barred

    def start(self) -> None:
        """Start the threads; daemons, all of them."""
        self._singles.reporting.start()
        self.health.start()
        self._loops.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Give back all deliveries, then end the threads: after `drain`, or instead of it. Whether `timeout` seconds were enough.

        A stopped or drained consumer gives back each delivery that it takes, also when it is started anew.
        """
        self._begin_draining()
        self._jobs.give_back_all(DrainedError())
        ended = self._loops.stop(timeout)  # before the reporting: the loop of suspects waits for a report
        return Services(self._singles.reporting, self.health).stop(timeout) and ended

    def _services(self) -> Services:
        run_shards = partial(self._each, self._bulk, self._run_shard)
        return Services(
            Service("intake", self._take_in, wake=self._intake.wake),
            Service("later", self._begin_again, wake=self.later.look),
            Service("accused", self._take_accused_in, wake=self._accused.wake),
            self._revocations.carrying_out,
            Service("suspects", partial(self._each, self._suspect, self._run_alone), wake=self._suspect.wake),
            Service("shards", run_shards, wake=self._bulk.wake, threads=self._limits.shards),
        )

    def take(self, delivery: Delivery, *, after: float = 0.0) -> None:
        """Take in one delivery, to begin in `after` seconds. It is given back when the worker drains."""
        with self._changed:
            self._held[id(delivery)] = delivery
        self._tally.taken(delivery)
        if after <= 0 or delivery.revoked:
            self._route(delivery)
        elif self.barred is not None or not self.later.put(delivery, after):
            self.give_back(delivery)

    def cancel(self, name: str) -> None:
        """Stop a job, or all jobs of a run, by id; their record says already that they are cancelled."""
        self._jobs.cancel(name)

    def revoke(self, name: str, at: float) -> None:
        """End a job by its name in Celery's tools: a single job as cancelled, a shard as a dead letter. `at`: as in `order`."""
        self._revocations.order(name, at)

    def held(self, name: str) -> Sequence[Delivery]:
        """The deliveries with this name that are here."""
        with self._changed:
            return [delivery for delivery in self._held.values() if delivery.id == name]

    def wait_no_more(self, delivery: Delivery) -> None:
        """Take the delivery out of those that begin later."""
        self.later.pick(lambda one: one is delivery)

    def drain(self, seconds: float, hurry: threading.Event | None = None) -> None:
        """Give back waiting jobs, wait up to `seconds` for running jobs (less once `hurry` is set), then give the rest back."""
        self._begin_draining()
        self._wait_until_empty(seconds, hurry)
        self._jobs.give_back_all(DrainedError())
        self._wait_until_empty(max(2.0, seconds))

    def _begin_draining(self) -> None:
        self._draining.set()
        self.health.release()
        for delivery in self.later.close():
            self.give_back(delivery)

    def done(self, delivery: Delivery, message: JobMessage, ending: Ending) -> None:
        """Acknowledge the message, and count its work."""

        def act() -> None:
            self._tally.done(message, ending)
            delivery.done(ending)

        self._leave(delivery, act)

    def give_back(self, delivery: Delivery, *, delay: float = 0.0, aside: float = 0.0) -> None:
        """Put the message back to its place in the queue.

        With a `delay` it waits so many seconds first, and counts as a retry. This worker leaves it to others for `aside` seconds.
        """

        def act() -> None:
            self._tally.handed_back()
            if aside and delivery.lease is not None:
                delivery.lease.put_off(aside)
            delivery.give_back(delay)

        self._leave(delivery, act)

    def hand_over(self, delivery: Delivery, queue: str) -> None:
        """Move the message to the queue of the revision that its job wants."""

        def act() -> None:
            self._tally.handed_over()
            delivery.hand_over(queue)

        self._leave(delivery, act)

    def refuse(self, delivery: Delivery, reason: str) -> None:
        """Move the message to the dead letters."""
        self._leave(delivery, lambda: delivery.refuse(reason))

    def postpone(self, delivery: Delivery, error: Exception) -> None:
        """A service failed a job: begin it again, here or elsewhere, or refuse it. See `Tries`."""
        self._tries.after(delivery, error)

    def _bar(self, barred: str | None) -> None:
        """S3 refuses this worker: give all deliveries back. A delivery that is still on its way in goes back when it begins."""
        if barred is not None:
            for delivery in self.later.pick(lambda _: True):
                self.give_back(delivery)
            self._jobs.give_back_all(BarredError(barred))

    def _leave(self, delivery: Delivery, act: Callable[[], None]) -> None:
        """The one place where deliveries end. A second call for a delivery does nothing; a delivery that cannot end goes back."""
        with self._changed:
            if self._held.pop(id(delivery), None) is None:
                return
            self._leaving += 1
        try:
            act()
        except Exception:
            log.exception("a delivery cannot end, and goes back to its queue")
            delivery.give_back()
        finally:
            with self._changed:
                self._leaving -= 1
                self._changed.notify_all()

    def _wait_until_empty(self, seconds: float, hurry: threading.Event | None = None) -> None:
        if hurry is not None:  # it is set by a signal's handler, which must not touch a lock of ours
            # This thread is no service: it ends with this wait.
            threading.Thread(target=self._notify_when, args=(hurry, seconds), daemon=True).start()
        with self._changed:
            self._changed.wait_for(
                lambda: not (self._held or self._leaving) or (hurry is not None and hurry.is_set()), seconds
            )

    def _notify_when(self, hurry: threading.Event, seconds: float) -> None:
        hurry.wait(seconds)
        with self._changed:
            self._changed.notify_all()

    def _take_in(self, stopping: threading.Event) -> None:
        while batch := self._intake.take(stopping, most=TOGETHER):
            self.health.wait()
            try:
                self._sort(batch)
            except Exception:
                log.exception("taking in %d deliveries failed", len(batch))

    def _route(self, delivery: Delivery) -> None:
        if delivery.revoked:
            self._revocations.order_delivery(delivery)
        elif delivery.deliveries >= self._limits.deliveries:
            self._accused.put(delivery)
        else:
            self._intake.put(delivery)

    def _sort(self, batch: list[Delivery]) -> None:
        singles = []
        for delivery, message in self._readable(batch):
            if message.shard is not None:
                self._bulk.put((delivery, message))
            else:
                singles.append((delivery, message))
        if singles:
            self._singles.start(singles)

    def _readable(self, batch: list[Delivery]) -> list[_Read]:
        """The deliveries that are jobs, each with its job. The others end here; while the worker drains, all end here."""
        found = []
        for delivery in batch:
            if self._draining.is_set() or self.barred is not None:
                self.give_back(delivery)
                continue
            try:
                message = job_of(delivery)
                other = self._jobs.elsewhere(message)
            except ContractError as error:
                log.error("refused a message: %s", error)
                self.refuse(delivery, str(error))
            except ServiceUnavailableError as error:
                self.postpone(delivery, error)
            except Exception as error:
                log.exception("taking in a message failed")
                self.postpone(delivery, error)
            else:
                if other is None:
                    found.append((delivery, message))
                else:
                    self.hand_over(delivery, other)
        return found

    def _take_accused_in(self, stopping: threading.Event) -> None:
        """Uncount the deliveries of all suspects of one fetch before the first of them runs.

        The suspects of a fetch come one by one, so the first one waits until no more come for GATHER_SECONDS.
        """
        while batch := self._accused.take(stopping):
            while more := self._accused.take(stopping, seconds=GATHER_SECONDS):
                batch += more
            with self._goes_on(*batch):
                self._count_patiently(batch, excused=True)
                for delivery, message in self._readable(batch):
                    self._accuse(delivery, message)

    def _accuse(self, delivery: Delivery, message: JobMessage) -> None:
        """Let a suspect run alone. A single job whose headers call it a shard comes here however often it was delivered."""
        if message.shard is None and delivery.deliveries > self._limits.deliveries:
            self.refuse(delivery, KILLED.format(delivery.deliveries - 1))
        else:
            self._suspect.put((delivery, message))

    def _count_patiently(self, batch: list[Delivery], *, excused: bool) -> bool:
        """Set the delivery counts in Redis as soon as Redis answers; False when the worker drains before."""
        while self.health.wait() and not self._draining.is_set():
            if self._counted(batch, excused=excused):
                return True
            self.health.check()
            self._draining.wait(RETRY_SECONDS)
        return False

    def _counted(self, batch: list[Delivery], *, excused: bool) -> bool:
        try:
            self._reporter.count_deliveries([one.lease for one in batch if one.lease is not None], excused=excused)
        except PipefleetError as error:
            log.warning("suspects wait: %s", error)
            return False
        return True

    def _each(
        self, deliveries: Inbox[_Read], run: Callable[[Delivery, JobMessage], None], stopping: threading.Event
    ) -> None:
        for delivery, message in deliveries.each(stopping):
            with (
                log_context(job=message.id, run=message.shard.run_id if message.shard else None),
                self._goes_on(delivery),
            ):
                run(delivery, message)

    @contextlib.contextmanager
    def _goes_on(self, *deliveries: Delivery) -> Iterator[None]:
        """Keep the thread alive: log an error inside; the deliveries that have not ended begin again later."""
        try:
            yield
        except Exception as error:
            log.exception("a thread of the consumer failed and goes on")
            with self._changed:
                here = [delivery for delivery in deliveries if id(delivery) in self._held]
            for delivery in here:
                self.later.pick(lambda one, ours=delivery: one is ours)  # type: ignore[misc]
                self.postpone(delivery, error)

    def _run_shard(self, delivery: Delivery, message: JobMessage) -> None:
        self._gate.enter()
        try:
            self._end(delivery, message)
        finally:
            self._gate.leave()

    def _run_alone(self, delivery: Delivery, message: JobMessage) -> None:
        with self._gate.alone():
            if not self._count_patiently([delivery], excused=False):
                return self.give_back(delivery)
            if message.shard is None:
                self._singles.run_alone(delivery, message)
            else:
                self._end(delivery, message)
            self._counted([delivery], excused=True)  # its ack may be unwritten when the next one kills this process

    def _shard(self, delivery: Delivery, message: JobMessage) -> Ending:
        assert message.shard is not None
        if self._draining.is_set() or self.barred is not None:
            raise DrainedError
        with self._revocations.running(delivery, message):
            delivery.started()
            if delivery.deliveries > self._limits.deliveries:
                return self._suspects.run(message, message.shard)
            return self._shards.run(message, message.shard, patient=delivery.retries < self._limits.retries)

    def _end(self, delivery: Delivery, message: JobMessage) -> None:
        """Run a shard, and end its delivery according to its ending."""
        try:
            ending = self._shard(delivery, message)
        except DrainedError:
            self.give_back(delivery)
        except RevokedError:
            self.refuse(delivery, REVOKED)
        except ContractError as error:
            log.error("refused a shard: %s", error)
            self.refuse(delivery, str(error))
        except PipefleetError as error:
            self.postpone(delivery, error)
        except Exception as error:
            log.exception("a shard failed")
            self.postpone(delivery, error)
        else:
            self.done(delivery, message, ending)

    def _begin_again(self, stopping: threading.Event) -> None:
        while due := self.later.take():
            for delivery in due:
                self._route(delivery)
