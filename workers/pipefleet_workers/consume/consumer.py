"""`Consumer`: takes deliveries from the queue and ends each of them exactly once: done, given back, handed over, or refused.

    take ─┬▶ intake ─┬▶ singles            many jobs at once, no thread for each
          │          └▶ shards             a few threads
          ├▶ accused ─▶ suspects           alone: delivered so often that they may have killed their workers
          ├▶ later ───▶ one of these       not before their time
          └▶ revocations                   an operator does not want them

When a service fails a job, the job begins again here after a pause. The failure counts only while the services are well
otherwise: an outage makes work wait, and never makes it fail. When S3 refuses every request of this worker, all its jobs go back
for other workers, and it takes none until the refusal ends. When S3 refuses only the objects of one job, this job goes back a few
times and is refused then.

The head of `suspects` says how the deliveries of a suspect are counted.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from pipefleet.contract.messages import JobMessage, decode_message
from pipefleet.errors import (
    AccessDeniedError,
    ContractError,
    ObjectRefusedError,
    PipefleetError,
    ServiceFullError,
    ServiceUnavailableError,
)
from pipefleet.patience import pause
from pipefleet.queues.dead_letters import KILLED
from pipefleet.service import Inbox, Service, Services
from pipefleet_workers.consume.gate import Gate
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.held import Delivery, DrainedError, RevokedError
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.later import Later
from pipefleet_workers.consume.places import PASS_ON_SECONDS, Places
from pipefleet_workers.consume.revocations import Revocations
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.singles import TOGETHER, Singles
from pipefleet_workers.consume.suspects import Suspects
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.ending import REVOKED, Ending
from pipefleet_workers.observe.logs import log_context
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import BarredError, RefusedHereError

log = logging.getLogger(__name__)
_Read = tuple[Delivery, JobMessage]
GATHER_SECONDS = 0.05
"""Suspects that come within these seconds of each other count as fetched together."""
RETRY_SECONDS = 0.5
"""Pause before a small step that a service failed is tried again."""


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How much a consumer does at once, and how long it goes on trying."""

    shards: int = 8
    """Shards that run at once."""
    denials: int = 4
    """How often a job goes back for another worker when S3 refuses its objects to this worker, which is well otherwise."""
    deliveries: int = 3
    """A message that was delivered this often runs alone; a shard that was delivered more often is split."""
    retries: int = 6
    """How often a job begins again because a service failed only this job; after that its item fails."""
    pause: tuple[float, float] = (1.0, 30.0)
    """Seconds before a job begins again: the first pause and the longest."""


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
        self._places = places or Places()
        self._draining = threading.Event()
        self._gate = Gate()
        self._singles = Singles(jobs, reporter, self._gate, self, tally, budget=self._limits.retries)
        self._revocations = Revocations(jobs, reporter, health, self, self._draining)
        self._bulk: Inbox[_Read] = Inbox()
        self._suspect: Inbox[_Read] = Inbox()
        self._accused: Inbox[Delivery] = Inbox()
        self._intake: Inbox[Delivery] = Inbox()
        self.later: Later[Delivery] = Later(clock)
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

    def give_back(self, delivery: Delivery) -> None:
        """Put the message back to its place in the queue."""

        def act() -> None:
            self._tally.handed_back()
            delivery.give_back()

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
        """Begin a job again later. A failure counts, up to a bound, while everything else works; an outage does not count."""
        if self._draining.is_set() or delivery.lost or isinstance(error, BarredError):
            return self.give_back(delivery)
        if isinstance(error, RefusedHereError) and delivery.lease is not None:
            return self._pass_on(delivery, delivery.lease, error)
        is_well = self.health.check()
        if self.barred is not None:
            return self.give_back(delivery)
        if is_well and isinstance(error, AccessDeniedError) and delivery.lease is not None:
            return self._try_elsewhere(delivery, delivery.lease, error)
        if is_well and isinstance(error, ObjectRefusedError):
            return self.refuse(delivery, str(error))
        if is_well and not isinstance(error, ServiceFullError):
            delivery.retries += 1
        if delivery.retries > self._limits.retries + 1:
            return self.refuse(delivery, f"failed {delivery.retries} times, at last with: {error}")
        first, longest = self._limits.pause
        seconds = pause(max(0, delivery.retries - 1), first=first, longest=longest)
        log.warning("a job begins again in %.1f s: %s", seconds, error)
        if not self.later.put(delivery, seconds):
            self.give_back(delivery)
        elif delivery.revoked:  # it was revoked during the put, and the revocation did not find it
            self.wait_no_more(delivery)
            self._route(delivery)

    def _try_elsewhere(self, delivery: Delivery, lease: Lease, error: Exception) -> None:
        """Give a job back whose objects S3 refuses. Redis counts these tries, so the job ends when every worker is refused."""
        if self._passed_on(delivery, lease):
            return
        if lease.retries >= self._limits.denials:
            return self.refuse(delivery, f"refused on {lease.retries + 1} tries, at last with: {error}")
        first, longest = self._limits.pause
        seconds = pause(lease.retries, first=first, longest=longest)
        log.warning("a job goes back for another worker to try in %.1f s: %s", seconds, error)

        def act() -> None:
            self._tally.handed_back()
            delivery.give_back(seconds)

        self._leave(delivery, act)

    def _passed_on(self, delivery: Delivery, lease: Lease) -> bool:
        """Whether a job went back uncounted because S3 may allow its bucket to another worker."""
        try:
            if not self._places.refused(_job_of(delivery)):
                return False
        except PipefleetError as error:
            log.warning("cannot see whether other workers are refused: %s", error)
            return False
        self._pass_on(delivery, lease, "S3 refuses its bucket to this worker, and not to others")
        return True

    def _pass_on(self, delivery: Delivery, lease: Lease, why: object) -> None:
        """Give a job back for another worker, uncounted.

        It is kept aside for a moment; else this worker would take it again at once.
        """
        log.warning("a job goes back: %s", why)

        def act() -> None:
            self._tally.handed_back()
            lease.put_off(PASS_ON_SECONDS)
            delivery.give_back()

        self._leave(delivery, act)

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
                message = _job_of(delivery)
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


def _job_of(delivery: Delivery) -> JobMessage:
    """The job of a delivery, with the earlier of its two deadlines. Raises ContractError.

    The deadline in the headers of a shard is ignored: its run has no deadline, and a copied header could fail its items.
    """
    message = decode_message(delivery.payload)
    if message.shard is not None:
        return message
    deadlines = [one for one in (message.deadline, delivery.deadline) if one is not None]
    return replace(message, deadline=min(deadlines)) if deadlines else message
