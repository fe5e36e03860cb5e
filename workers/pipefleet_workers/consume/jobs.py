"""The common part of single jobs and shards: whether this worker may run them, and their way into the engine.

`singles` and `shards` call `begin`, `admit` and `end`; the consumer stops jobs with `cancel`, `revoke` and `give_back_all`.
Refused jobs and items get a JobFailure; only `elsewhere` raises (ServiceUnavailableError).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.messages import MAX_MESSAGE_BYTES, JobItem, JobMessage
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import refs_in
from pipefleet.errors import ContractError, PipefleetError
from pipefleet.fleet.pools import Pool, model_label
from pipefleet.printable import printable
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TaskSpec, task_spec
from pipefleet.tasks.parameters import layered
from pipefleet_workers.adapters.base import brief
from pipefleet_workers.consume.elsewhere import Elsewhere
from pipefleet_workers.consume.held import RevokedError
from pipefleet_workers.engine.engine import Engine
from pipefleet_workers.items import JobContext, Nowhere, Outcome, Sink, Work
from pipefleet_workers.process.sizes import bytes_of, text_bytes
from pipefleet_workers.results.lines import PartWriter
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.storage.store import WorkerStore
from pipefleet_workers.storage.uri_gate import UriGate

log = logging.getLogger(__name__)
UNKNOWN_BYTES = 1 << 20
"""The weight of an object of unknown size."""


@dataclass(frozen=True, slots=True)
class Outlets:
    """Where results go: parts and results to S3, states and progress to Redis, the end of a run to both."""

    store: WorkerStore
    objects: ObjectStore
    parts: PartWriter
    reporter: Reporter
    allowed: tuple[str, ...] = ("s3://",)
    """Prefixes that outputs may lie under."""


class Jobs:
    """The jobs inside this worker. Thread-safe.

    `clock` gives seconds since 1970 on the clock of deadlines; a worker passes the Redis server's clock.
    """

    def __init__(
        self,
        pool: Pool,
        engine: Engine,
        allowed: tuple[str, ...] = ("s3://",),
        elsewhere: Elsewhere | None = None,
        *,
        store: str = "",
        clock: Callable[[], float] = time.time,
        is_away: Callable[[], bool] = lambda: False,
    ) -> None:
        """`store` is the prefix of the fleet's own uploads and results; no job may write there. For `is_away` see `JobContext`."""
        self._pool = pool
        self._spec: TaskSpec = task_spec(pool.task)
        self._gate = UriGate(allowed, store)
        self._elsewhere = elsewhere
        self._contexts: dict[int, JobContext] = {}
        self._revoked: set[str] = set()
        self._lock = threading.Lock()
        self.engine = engine
        self.turn = threading.Lock()
        """A shard holds this lock while its items enter, so that the items of an earlier shard enter first."""
        self.clock = clock
        self.is_away = is_away

    def begin(self, message: JobMessage, sink: Sink, *, priority: int, patient: bool) -> JobContext:
        """The context of a job that begins here; the caller must call `end` later. For `patient` see `JobContext.patient`."""
        context = JobContext(
            id=message.id,
            run_id=message.shard.run_id if message.shard else None,
            parameters=self._settled(self._pool.parameters, message.parameters),
            settle=self._settled,
            priority=priority,
            deadline=self._local(message.deadline),
            sink=sink,
            patient=patient,
            is_away=self.is_away,
            shard=message.shard,
            streams=message.stream and message.shard is None,
        )
        with self._lock:
            self._contexts[id(context)] = context
            revoked = message.id in self._revoked
        if revoked:
            context.give_back(RevokedError())
        return context

    def _settled(self, below: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._spec.settled(layered(self._spec, below, own))

    def _local(self, deadline: float | None) -> float | None:
        """The deadline on the monotonic clock, which does not jump while the job is here."""
        return None if deadline is None else time.monotonic() + (deadline - self.clock())

    def end(self, context: JobContext) -> None:
        """The job has left this worker. Later outcomes go nowhere."""
        with self._lock:
            self._contexts.pop(id(context), None)
        context.sink = Nowhere()  # outcomes refer to their job: without the circle their memory is free at once

    def cancel(self, name: str) -> None:
        """Stop a job, or all jobs of a run, by id."""
        with self._lock:
            for context in self._contexts.values():
                if name in (context.id, context.run_id):
                    context.cancelled = True

    def revoke(self, job_id: str) -> None:
        """End a job here without a result, and every job of this id that begins before `forget`. Its sink gets a RevokedError."""
        with self._lock:
            self._revoked.add(job_id)
            contexts = [context for context in self._contexts.values() if context.id == job_id]
        for context in contexts:
            context.give_back(RevokedError())

    def forget(self, job_id: str) -> None:
        """The revoked job has left this worker."""
        with self._lock:
            self._revoked.discard(job_id)

    def give_back_all(self, reason: Exception) -> None:
        """End every job here without a result."""
        with self._lock:
            contexts = list(self._contexts.values())
        for context in contexts:
            context.give_back(reason)

    def elsewhere(self, message: JobMessage) -> str | None:
        """The queue of the revision that a job of this task wants. None if this worker serves it, or if no worker does.

        Raises ServiceUnavailableError.
        """
        if message.task != self._pool.task or self._serves(message) or self._elsewhere is None:
            return None
        return self._elsewhere.queue_for(message)

    def refusal(self, message: JobMessage) -> JobFailure | None:
        """Why this worker must not run a job, or None."""
        if message.task != self._pool.task or not self._serves(message):
            return JobFailure("wrong_pool", self._wrong_pool(message), "consume")
        forbidden = self._gate.output(message)
        if forbidden is not None:
            return JobFailure("forbidden", forbidden, "consume")
        if message.shard is None and len(message.items) != 1:
            return JobFailure("bad_contract", "a job without a shard carries one item", "consume")
        try:
            self._spec.check(message.parameters)
        except PipefleetError as error:
            return JobFailure(error.code, str(error), "consume")
        return None

    def _serves(self, message: JobMessage) -> bool:
        return message.model is None or self._pool.serves(self._pool.task, message.model, message.revision)

    def _wrong_pool(self, message: JobMessage) -> str:
        served = model_label(self._pool.model, self._pool.revision)
        wanted = printable(model_label(message.model or "", message.revision), 200)
        wants = f"the job wants {printable(message.task)} with {wanted or 'any model'}"
        text = f"{wants}, this worker serves {self._pool.task} with {served}"
        if message.task != self._pool.task:
            return text
        return f"{text}, and no worker and no fleet file names the other; submit it for {served}, or start a worker for it first"

    def admit(self, works: Sequence[Work], *, bulk: bool) -> None:
        """Send items into the engine; items that must not enter end at once. Bulk items wait here for room."""
        admitted = []
        for work in works:
            failure = self._item_failure(work)
            if failure is None:
                admitted.append(work)
            else:
                work.job.sink.deliver(Outcome(work, failure=failure))
        self.engine.admit(admitted, bulk=bulk)

    def _item_failure(self, work: Work) -> JobFailure | None:
        """Why an item must not enter the engine, or None. Parameters and references come from any program that can queue."""
        item = work.item
        if not item.parameters and isinstance(item.inputs, str):
            return None  # the quick way of most items
        try:
            self._spec.check(item.parameters)
            refs_in(item.inputs)
        except PipefleetError as error:
            return JobFailure(error.code, str(error), "consume")
        except Exception as error:  # the fault of this item; the other items must not fail
            log.exception("looking at an item failed")
            return JobFailure("internal_error", brief(error), "consume")
        return None


def work_of(context: JobContext, position: int, item: JobItem) -> Work:
    """One item of a job in the form that the engine takes."""
    parameters = context.settle(context.parameters, item.parameters) if item.parameters else context.parameters
    own = text_bytes(item.parameters, MAX_MESSAGE_BYTES) if item.parameters else 0
    if isinstance(item.inputs, str):
        return Work(context, position, item, parameters, len(item.inputs) + own, fetches=False)
    try:
        references = refs_in(item.inputs)
    except ContractError:
        references = []  # `admit` refuses this item
    weight = sum(UNKNOWN_BYTES if one.size is None else one.size for one in references) + bytes_of(item.inputs) + own
    return Work(context, position, item, parameters, weight, fetches=bool(references))
