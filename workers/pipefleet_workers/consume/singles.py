"""Single jobs: no thread waits for a single job. They start together, share batches like all items, and are reported together.

    start ─┬▶ engine ─▶ Single.deliver ─┬▶ reports ─▶ finish_many: one round trip ─▶ ack
           └▶ start_many: one round trip ┘

The consumer's intake thread starts jobs; threads of the engine deliver; a thread of its own reports. Where forwards are short, a
new job enters the engine before Redis has answered that it runs: a round trip takes as long as a small model's forward. Its end
is reported after this answer. Any other job enters after the answer, so no long forward runs for a job that has ended before.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipefleet.contract.messages import JobMessage, JobState
from pipefleet.errors import ServiceUnavailableError
from pipefleet.service import Inbox, Service
from pipefleet_workers.adapters.progress import STAGE
from pipefleet_workers.consume.gate import Gate
from pipefleet_workers.consume.held import Delivery, DrainedError
from pipefleet_workers.consume.jobs import Jobs, work_of
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.ending import LOST, Ending, before
from pipefleet_workers.items import JobContext, Outcome, Work
from pipefleet_workers.observe import opentelemetry
from pipefleet_workers.results.reports import Reporter

log = logging.getLogger(__name__)
TOGETHER = 128
"""At most so many jobs start, or are reported, in one round trip."""
SHORT_SECONDS = 0.01
"""Longest forward, in seconds for each item, that may run before Redis has answered. A round trip takes about a millisecond."""
YIELD_SECONDS = 0.0001
"""A pause after jobs have entered the engine, in which its threads get Python's lock. This thread would keep the lock until it
waits for Redis, and it has the time: the answer is needed only when the jobs end."""
FADING = 0.9
"""The part of the longest forward that counts after one more job: a long forward is remembered over dozens of short ones."""


class Ends(Protocol):
    """Where deliveries end; of several calls for one delivery the first counts. Called by any thread."""

    def done(self, delivery: Delivery, message: JobMessage, ending: Ending) -> None:
        """Acknowledge the message."""

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
    """Set when the delivery has left this worker's hands; `run_alone` waits for it."""
    left: bool = False
    """True once its delivery has ended."""
    _end: Outcome | Ending | Exception | None = None
    _running: bool = False
    """Whether Redis has answered that the job runs, or that it must not; ends wait for the answer."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def wanted(self) -> bool:
        """Whether nothing has ended the job here yet."""
        return self._end is None

    def deliver(self, *outcomes: Outcome) -> None:
        """Take the outcome; a second one is dropped."""
        for outcome in outcomes:
            self._take(outcome)

    def abandon(self, reason: Exception) -> None:
        """End the job without an outcome."""
        self._take(reason)

    def _take(self, end: Outcome | Exception) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._end = end
            if not self._running:
                return
        self.singles.reports.put((self, end))

    def runs(self) -> None:
        """Redis has answered that the job runs: its end may be reported."""
        try:
            self.delivery.started(quick=self.singles.quick)
        except Exception as error:
            log.exception("beginning job %r failed", self.message.id)
            self.abandon(error)
        with self._lock:
            self._running, end = True, self._end
        if end is not None:
            self.singles.reports.put((self, end))

    def runs_not(self, end: Ending | Exception) -> None:
        """The job has ended before, or Redis cannot say whether it has: stop it here. Its outcome counts as nothing."""
        with self._lock:
            self._running, self._end = True, end
        if self.context is not None:
            self.context.give_back(DrainedError())  # the stages drop it; `abandon` keeps the end that is there
        self.singles.reports.put((self, end))


class Singles:
    """Starts and reports single jobs. `start` is called by one thread, outcomes come from any; the service `reporting` reports."""

    def __init__(self, jobs: Jobs, reporter: Reporter, gate: Gate, ends: Ends, tally: Tally, *, budget: int) -> None:
        self._jobs = jobs
        self._reporter = reporter
        self._gate = gate
        self._ends = ends
        self._tally = tally
        self._budget = budget
        self._longest = math.inf
        """Seconds of the longest forward lately. The thread that reports writes it; the thread that starts reads it."""
        self.reports: Inbox[tuple[Single, Any]] = Inbox()
        self.reporting = Service("report", self._report, wake=self.reports.wake)

    @property
    def quick(self) -> bool:
        """Whether all forwards were short lately."""
        return self._longest <= SHORT_SECONDS

    def start(self, batch: Sequence[tuple[Delivery, JobMessage]]) -> None:
        """Start jobs, all in one round trip; the delivery of each ends when it is reported."""
        self._gate.enter(len(batch))
        self._start([Single(delivery, message, self) for delivery, message in batch])

    def run_alone(self, delivery: Delivery, message: JobMessage) -> None:
        """Run one job to its end. The caller has made sure that no other job runs."""
        single = Single(delivery, message, self, ended=threading.Event())
        self._start([single])
        assert single.ended is not None
        single.ended.wait()

    def _start(self, singles: Sequence[Single]) -> None:
        """Start jobs; raises nothing: a job that cannot begin leaves, and begins again later."""
        begun = [(single, work) for single in singles for work in self._begun(single)]
        at_once = [self._enters_at_once(single) for single, _ in begun]
        self._enter([work for (_, work), now in zip(begun, at_once, strict=True) if now])
        if any(at_once):
            time.sleep(YIELD_SECONDS)
        self._mark_running(singles)
        self._enter([work for (single, work), now in zip(begun, at_once, strict=True) if not now and single.wanted])

    def _enters_at_once(self, single: Single) -> bool:
        """Whether a job enters the engine before Redis has answered.

        A job that was here or elsewhere before waits for the answer. It may have ended since, or have killed its worker and been
        cancelled for this.
        """
        return self.quick and single.delivery.deliveries <= 1 and not single.delivery.retries

    def _enter(self, works: Sequence[Work]) -> None:
        for priority in sorted({work.job.priority for work in works}):
            self._admit([work for work in works if work.job.priority == priority])

    def _mark_running(self, singles: Sequence[Single]) -> None:
        """Mark jobs as running, all in one round trip; stop those that have ended before, or whose state is not known."""
        try:
            states = self._reporter.start_many([single.message for single in singles])
        except ServiceUnavailableError as error:
            for single in singles:
                single.runs_not(error)
            return
        except Exception as error:  # noqa: BLE001 - logged for the job that caused it
            return self._mark_each(singles, error)
        for single, state in zip(singles, states, strict=True):
            if state is JobState.RUNNING:
                single.runs()
            else:
                single.runs_not(before(state) if isinstance(state, JobState) else state)

    def _mark_each(self, singles: Sequence[Single], error: Exception) -> None:
        """Mark jobs one by one, after one bad job (such as an id that Redis cannot store) failed the round trip of all."""
        if len(singles) > 1:
            for single in singles:
                self._mark_running([single])
        else:
            log.error("starting job %r failed", singles[0].message.id, exc_info=error)
            singles[0].runs_not(error)

    def _begun(self, single: Single) -> list[Work]:
        """The item of a job; empty for a job that this worker must not run, or that fails to begin."""
        try:
            return self._begin(single)
        except Exception as error:
            log.exception("beginning job %r failed", single.message.id)
            single.abandon(error)
        return []

    def _admit(self, works: Sequence[Work]) -> None:
        try:
            self._jobs.admit(works, bulk=False)
        except Exception as error:
            log.exception("admitting %d jobs failed", len(works))
            for work in works:
                work.job.give_back(error)

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

    def _report(self, stopping: threading.Event) -> None:
        while batch := self.reports.take(stopping, most=TOGETHER):
            try:
                self._report_batch(batch)
            except Exception as error:
                log.exception("reporting %d jobs failed", len(batch))
                for single, _ in batch:
                    self._leave(single, error)

    def _report_batch(self, batch: Sequence[tuple[Single, Any]]) -> None:
        finished = []
        for single, end in batch:
            if isinstance(end, Exception | Ending):
                self._leave(single, end)
            elif single.delivery.lost:
                self._leave(single, LOST)  # the worker that now has the job reports it
            else:
                finished.append((single, end))
                self._note_forward(end.work.seconds)
        ends = [(single.message, outcome) for single, outcome in finished]
        for (single, outcome), ending in zip(finished, self._reporter.finish_many(ends), strict=True):
            if isinstance(ending, Ending):
                self._tally.single(ending)
                opentelemetry.job_ended(single.delivery, single.message, outcome)
            self._leave(single, ending)

    def _note_forward(self, seconds: Mapping[str, float]) -> None:
        if STAGE in seconds:
            faded = 0.0 if math.isinf(self._longest) else FADING * self._longest
            self._longest = max(seconds[STAGE], faded)

    def _leave(self, single: Single, end: Ending | Exception) -> None:
        """The one place where a single job's delivery ends. A second call, after an error in between, does nothing.

        The job leaves the gate in every case.
        """
        if single.left:
            return
        single.left = True
        try:
            self._end(single, end)
        except Exception:
            log.exception("the end of job %r failed; its message goes back", single.message.id)
            self._ends.give_back(single.delivery)  # does nothing if the delivery has ended
        finally:
            if single.ended is not None:
                single.ended.set()
            else:
                self._gate.leave()

    def _end(self, single: Single, end: Ending | Exception) -> None:
        if single.context is not None:
            self._jobs.end(single.context)
        if isinstance(end, Ending):
            self._ends.done(single.delivery, single.message, end)
        elif isinstance(end, DrainedError):
            self._ends.give_back(single.delivery)
        else:
            self._ends.postpone(single.delivery, end)
