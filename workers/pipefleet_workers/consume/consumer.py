"""`Consumer`: takes deliveries from the queue and sees to it that each ends once: done, given back, handed over, or refused.

    take ─┬▶ intake ─┬▶ singles            many jobs at once, no thread for each
          │          └▶ shards             a few threads
          └▶ accused ─▶ suspects           alone: delivered so often that they may have killed their workers

A suspect is excused while it waits: its delivery counts against it only when it runs, or the one that kills the worker would bring
down with it all that wait behind it.

A job that a service failed begins again here after a pause, counted only while the service is well otherwise: an outage makes
work wait, it does not make it fail.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipefleet.contract import JobMessage, decode_message
from pipefleet.errors import ContractError, PipefleetError, ServiceUnavailableError
from pipefleet.patience import pause
from pipefleet_workers.consume.delivery import Delivery, DrainedError
from pipefleet_workers.consume.gate import Gate
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.singles import TOGETHER, Singles
from pipefleet_workers.consume.suspects import Suspects
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.logs import log_context
from pipefleet_workers.reports import Reporter

log = logging.getLogger(__name__)
TICK = 0.05


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a consumer does at once, and how long it goes on trying."""

    shards: int = 8
    """Shards that run at once."""
    deliveries: int = 3
    """A message that is delivered as often as this runs alone; a shard that was delivered more often is split."""
    retries: int = 6
    """How often a job begins again because a service failed it alone; after that its item fails."""
    pause: tuple[float, float] = (1.0, 30.0)
    """First and longest seconds before that."""


class Consumer:
    """Runs the jobs of one pool. `take` is called by the thread that reads the queue and returns at once."""

    def __init__(
        self,
        jobs: Jobs,
        shards: Shards,
        suspects: Suspects,
        reporter: Reporter,
        health: Health,
        *,
        tally: Tally,
        limits: Limits | None = None,
    ) -> None:
        self._jobs = jobs
        self._shards = shards
        self._suspects = suspects
        self._reporter = reporter
        self._health = health
        self._tally = tally
        self._limits = limits or Limits()
        self._gate = Gate()
        self._singles = Singles(jobs, reporter, self._gate, self, budget=self._limits.retries)
        self._bulk: queue.SimpleQueue[tuple[Delivery, JobMessage]] = queue.SimpleQueue()
        self._suspect: queue.SimpleQueue[tuple[Delivery, JobMessage]] = queue.SimpleQueue()
        self._accused: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._intake: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Delivery]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._inside = 0
        self._draining = threading.Event()

    def start(self) -> None:
        """Start the threads; daemons, all of them."""
        loops: list[Callable[[], None]] = [
            self._take_in,
            self._begin_again,
            self._take_accused_in,
            lambda: self._each(self._suspect, self._run_alone),
        ]
        loops += [lambda: self._each(self._bulk, self._run_shard)] * self._limits.shards
        for loop in loops:
            threading.Thread(target=loop, daemon=True).start()

    def take(self, delivery: Delivery) -> None:
        """Take one delivery in; it is given back when the worker drains."""
        with self._lock:
            self._inside += 1
        self._tally.taken(delivery)
        self._route(delivery)

    def cancel(self, name: str) -> None:
        """Stop a job, or all jobs of a run, by id."""
        self._jobs.cancel(name)

    def drain(self, seconds: float, hurry: threading.Event | None = None) -> None:
        """Give back what has not begun, wait up to `seconds` for the rest (less when `hurry` is set), then give that back too."""
        self._draining.set()
        with self._lock:
            waiting, self._later = self._later, []
        for _, _, delivery in waiting:
            self.give_back(delivery)
        deadline = time.monotonic() + seconds
        while self._inside and time.monotonic() < deadline and not (hurry and hurry.is_set()):
            time.sleep(TICK)
        self._jobs.give_back_all(DrainedError())
        deadline = time.monotonic() + max(2.0, seconds)
        while self._inside and time.monotonic() < deadline:
            time.sleep(TICK)

    def done(self, delivery: Delivery, message: JobMessage, state: str) -> None:
        """Acknowledge, and count the work."""
        self._tally.done(message, state)
        delivery.done(state)

    def give_back(self, delivery: Delivery) -> None:
        """Put the message back to its place in the queue."""
        self._tally.handed_back()
        delivery.give_back()

    def postpone(self, delivery: Delivery, error: Exception) -> None:
        """Begin a job again later. A failure while everything else works is counted, and bounded; an outage is waited for."""
        if self._draining.is_set() or delivery.lost:
            return self.give_back(delivery)
        if self._health.check():
            delivery.retries += 1
        if delivery.retries > self._limits.retries + 1:
            return delivery.refuse(f"failed {delivery.retries} times, at last with: {error}")
        first, longest = self._limits.pause
        seconds = pause(max(0, delivery.retries - 1), first=first, longest=longest)
        log.warning("a job begins again in %.1f s: %s", seconds, error)
        with self._lock:  # `drain` empties the heap once, so nothing may come in behind it
            draining = self._draining.is_set()
            if not draining:
                heapq.heappush(self._later, (time.monotonic() + seconds, next(self._order), delivery))
        if draining:
            self.give_back(delivery)

    def ended(self) -> None:
        """Count a delivery that has left this worker's hands."""
        with self._lock:
            self._inside -= 1

    def _take_in(self) -> None:
        while True:
            batch = [self._intake.get()]
            while len(batch) < TOGETHER and not self._intake.empty():
                batch.append(self._intake.get())
            while not (self._health.wait(TICK) or self._draining.is_set()):
                continue
            try:
                self._sort(batch)
            except Exception:
                log.exception("taking in %d deliveries failed", len(batch))

    def _route(self, delivery: Delivery) -> None:
        accused = delivery.deliveries >= self._limits.deliveries
        (self._accused if accused else self._intake).put(delivery)

    def _sort(self, batch: list[Delivery]) -> None:
        singles = []
        for delivery, message in self._readable(batch):
            if message.shard is not None:
                self._bulk.put((delivery, message))
            else:
                singles.append((delivery, message))
        if singles:
            self._singles.start(singles)

    def _readable(self, batch: list[Delivery]) -> list[tuple[Delivery, JobMessage]]:
        """The deliveries that are jobs, with these; the others end here, and all of them while the worker drains."""
        found = []
        for delivery in batch:
            if self._draining.is_set():
                self.give_back(delivery)
                continue
            try:
                message = decode_message(delivery.payload)
                other = self._jobs.elsewhere(message)
            except ContractError as error:
                log.error("refused a message: %s", error)
                delivery.refuse(str(error))
            except ServiceUnavailableError as error:
                self.postpone(delivery, error)
            else:
                if other is None:
                    found.append((delivery, message))
                else:
                    self._tally.handed_over()
                    delivery.hand_over(other)
        return found

    def _take_accused_in(self) -> None:
        """Excuse the accused as they come, and let the first one run only when no more come: all of a fetch are excused then."""
        while True:
            batch = [self._accused.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._accused.get(timeout=TICK))
            while not (self._draining.is_set() or self._counted(batch, -1)):
                time.sleep(TICK)
            for pair in self._readable(batch):
                self._suspect.put(pair)

    def _counted(self, batch: list[Delivery], by: int) -> bool:
        """Change how often these count as delivered; False while Redis is away."""
        try:
            self._reporter.count_deliveries([one.lease for one in batch if one.lease is not None], by)
        except PipefleetError as error:
            log.warning("suspects wait: %s", error)
            return False
        return True

    def _each(
        self, deliveries: queue.SimpleQueue[tuple[Delivery, JobMessage]], run: Callable[[Delivery, JobMessage], None]
    ) -> None:
        while True:
            delivery, message = deliveries.get()
            with log_context(job=message.id, run=message.shard.run_id if message.shard else None):
                run(delivery, message)

    def _run_shard(self, delivery: Delivery, message: JobMessage) -> None:
        self._gate.enter()
        try:
            self._end(delivery, message)
        finally:
            self._gate.leave()

    def _run_alone(self, delivery: Delivery, message: JobMessage) -> None:
        with self._gate.alone():
            while not (self._draining.is_set() or (self._health.wait(TICK) and self._counted([delivery], 1))):
                time.sleep(TICK)
            if self._draining.is_set():
                self.give_back(delivery)
                return
            if message.shard is None:
                self._singles.run_alone(delivery, message)
            else:
                self._end(delivery, message)
            self._counted([delivery], -1)  # its ack may not be written yet when the next one kills this process

    def _shard(self, delivery: Delivery, message: JobMessage) -> str:
        assert message.shard is not None
        if self._draining.is_set():
            raise DrainedError
        delivery.started()
        if delivery.deliveries > self._limits.deliveries:
            return self._suspects.run(message, message.shard)
        return self._shards.run(message, message.shard, patient=delivery.retries < self._limits.retries)

    def _end(self, delivery: Delivery, message: JobMessage) -> None:
        """Run a shard, and end its delivery as it deserves."""
        try:
            state = self._shard(delivery, message)
        except DrainedError:
            self.give_back(delivery)
        except ContractError as error:
            log.error("refused a shard: %s", error)
            delivery.refuse(str(error))
        except PipefleetError as error:
            self.postpone(delivery, error)
        except Exception as error:
            log.exception("a shard failed")
            self.postpone(delivery, error)
        else:
            self.done(delivery, message, state)

    def _begin_again(self) -> None:
        while not self._draining.wait(TICK):  # what waits then is given back by `drain`
            now = time.monotonic()
            with self._lock:
                due = []
                while self._later and self._later[0][0] <= now:
                    due.append(heapq.heappop(self._later)[2])
            for delivery in due:
                self._route(delivery)
