"""Single jobs: no thread waits for one. They start together, share batches like all items, and are reported together."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipefleet.contract import JobMessage
from pipefleet.errors import ServiceUnavailableError
from pipefleet_workers import telemetry
from pipefleet_workers.consume.delivery import Delivery, DrainedError
from pipefleet_workers.consume.gate import Gate
from pipefleet_workers.consume.jobs import Jobs, work_of
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.ending import LOST, Ending, before
from pipefleet_workers.items import JobContext, Outcome, Work
from pipefleet_workers.reports import Reporter

log = logging.getLogger(__name__)
TOGETHER = 128
"""Jobs that are started or reported in one round trip at most."""


class Ends(Protocol):
    """Where deliveries end; of several calls for one delivery the first counts. Called by any thread."""

    def done(self, delivery: Delivery, message: JobMessage, ending: Ending) -> None:
        """Acknowledge."""

    def give_back(self, delivery: Delivery) -> None:
        """Put the message back to its place in the queue."""

    def postpone(self, delivery: Delivery, error: Exception) -> None:
        """Begin the job again later."""


@dataclass(slots=True)
class Single:
    """One job with one item on its way through the worker; also the sink of its outcome."""

    delivery: Delivery
    message: JobMessage
    singles: Singles
    context: JobContext | None = None
    ended: threading.Event | None = None
    """Set when the delivery has left this worker's hands, for who waits."""
    left: bool = False
    """Set when its delivery has ended."""
    _end: Outcome | Exception | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def deliver(self, outcome: Outcome) -> None:
        """Take the outcome; a second one is dropped."""
        self._take(outcome)

    def abandon(self, reason: Exception) -> None:
        """End without an outcome."""
        self._take(reason)

    def _take(self, end: Outcome | Exception) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._end = end
        self.singles.reports.put((self, end))


class Singles:
    """Starts and reports single jobs. `start` is called by one thread, outcomes come from any."""

    def __init__(self, jobs: Jobs, reporter: Reporter, gate: Gate, ends: Ends, tally: Tally, *, budget: int) -> None:
        self._jobs = jobs
        self._reporter = reporter
        self._gate = gate
        self._ends = ends
        self._tally = tally
        self._budget = budget
        self.reports: queue.SimpleQueue[tuple[Single, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._report, name="report", daemon=True).start()

    def start(self, batch: Sequence[tuple[Delivery, JobMessage]]) -> None:
        """Start jobs, all in one round trip; each ends its delivery when it is reported."""
        self._gate.enter(len(batch))
        self._start([Single(delivery, message, self) for delivery, message in batch])

    def run_alone(self, delivery: Delivery, message: JobMessage) -> None:
        """Run one job to its end; the caller has made sure that nothing runs beside it."""
        single = Single(delivery, message, self, ended=threading.Event())
        self._start([single])
        assert single.ended is not None
        single.ended.wait()

    def _start(self, singles: Sequence[Single]) -> None:
        """Start jobs. Raises nothing: those that an error kept from beginning begin again later."""
        try:
            works = self._begun(singles)
            for priority in sorted({work.job.priority for work in works}):
                self._jobs.admit([work for work in works if work.job.priority == priority], bulk=False)
        except Exception as error:
            if not isinstance(error, ServiceUnavailableError):
                log.exception("starting %d jobs failed", len(singles))
            for single in singles:
                self._stop(single, error)

    def _begun(self, singles: Sequence[Single]) -> list[Work]:
        """The items of the jobs that begin. Raises what kept all of them from it; what is one job's alone is that one's end."""
        works = []
        for single, state in zip(singles, self._reporter.start_many([one.message for one in singles]), strict=True):
            if isinstance(state, Exception):
                self._stop(single, state)
            elif state.final:
                self._leave(single, before(state))
            else:
                works += self._begun_one(single)
        return works

    def _begun_one(self, single: Single) -> list[Work]:
        try:
            single.delivery.started()
            return self._begin(single)
        except Exception as error:
            log.exception("job %s cannot begin", single.message.id)
            self._stop(single, error)
            return []

    def _stop(self, single: Single, error: Exception) -> None:
        """A job begins again later, unless it has ended; what is already in the engine of it is dropped."""
        if single.context is None:
            self._leave(single, error)
        else:
            single.context.give_back(error)

    def _begin(self, single: Single) -> list[Work]:
        """The item of a job that this worker may run; a refused one ends here."""
        delivery, message = single.delivery, single.message
        patient = delivery.retries < self._budget
        single.context = self._jobs.begin(message, single, priority=delivery.priority, patient=patient)
        work = work_of(single.context, 0, message.items[0])
        refusal = self._jobs.refusal(message)
        if refusal is not None:
            single.deliver(Outcome(work, failure=refusal))
        return [work] if refusal is None else []

    def _report(self) -> None:
        while True:
            batch = [self.reports.get()]
            while len(batch) < TOGETHER and not self.reports.empty():
                batch.append(self.reports.get())
            try:
                self._report_batch(batch)
            except Exception as error:
                log.exception("reporting %d jobs failed", len(batch))
                for single, _ in batch:
                    self._leave(single, error)

    def _report_batch(self, batch: Sequence[tuple[Single, Any]]) -> None:
        finished = []
        for single, end in batch:
            if isinstance(end, Exception):
                self._leave(single, end)
            elif single.delivery.lost:
                self._leave(single, LOST)  # whoever has the job now reports it
            else:
                finished.append((single, end))
        ends = [(single.message, outcome) for single, outcome in finished]
        for (single, outcome), ending in zip(finished, self._reporter.finish_many(ends), strict=True):
            if isinstance(ending, Ending):
                self._tally.single(ending)
                telemetry.job_ended(single.delivery, single.message, outcome)
            self._leave(single, ending)

    def _leave(self, single: Single, end: Ending | Exception) -> None:
        """The one place where a single job's delivery ends. Once: a second call, after an error in between, does nothing."""
        if single.left:
            return
        single.left = True
        try:
            if single.context is not None:
                self._jobs.end(single.context)
            self._end_delivery(single, end)
        finally:  # or nobody could run alone any more
            if single.ended is not None:
                single.ended.set()
            else:
                self._gate.leave()

    def _end_delivery(self, single: Single, end: Ending | Exception) -> None:
        if isinstance(end, Ending):
            self._ends.done(single.delivery, single.message, end)
        elif isinstance(end, DrainedError):
            self._ends.give_back(single.delivery)
        else:
            self._ends.postpone(single.delivery, end)
