"""consume: one Celery message becomes the items of one job, and is acknowledged when their results are written.

Each message has a thread of Celery's pool, which admits its items, waits for the outcomes, writes and reports them. Raising
hands the message back to Celery: Reject(requeue) when the worker shuts down, Retry when a service is away.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipefleet.contract import JobItem, JobMessage, Priority, Shard, decode_message
from pipefleet.errors import ContractError, ObjectMissingError, PipefleetError
from pipefleet.finishing import finalise, write_failed_rows
from pipefleet.fleet import Pool, model_label
from pipefleet.layout import RunLayout
from pipefleet.objects import ObjectStore
from pipefleet.planner import decode_shard_line, read_plan
from pipefleet.records import JobFailure
from pipefleet.storage import StorageRef, refs_in
from pipefleet.tasks import TaskSpec, task_spec
from pipefleet_workers.engine import Engine
from pipefleet_workers.items import ItemError, JobContext, Outcome, Work
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.outcomes import Outcomes
from pipefleet_workers.reports import Reporter
from pipefleet_workers.stages.fetch import lies_under
from pipefleet_workers.stages.write import PartWriter

log = logging.getLogger(__name__)
PROGRESS_SECONDS = 0.25
UNKNOWN_BYTES = 1 << 20
"""What an object of unknown size is counted with."""


class DrainedError(Exception):
    """The worker shuts down and this job was not finished: its message goes back."""


@dataclass(frozen=True, slots=True)
class Outlets:
    """Where results go: parts and results to S3, states and progress to Redis, the end of a run to both."""

    store: WorkerStore
    objects: ObjectStore
    parts: PartWriter
    reporter: Reporter
    allowed: tuple[str, ...] = ("s3://",)
    """Prefixes that outputs may lie under."""


class Consumer:
    """Runs the jobs of one pool. `handle` is called by many threads at once."""

    def __init__(self, pool: Pool, engine: Engine, outlets: Outlets) -> None:
        self._pool = pool
        self._spec: TaskSpec = task_spec(pool.task)
        self._engine = engine
        self._outlets = outlets
        self._jobs: dict[int, JobContext] = {}
        self._lock = threading.Lock()
        self._one_shard_at_a_time = threading.Lock()
        self._draining = False

    def handle(self, payload: Any) -> str:
        """Run one message to its end and return the state it reached.

        Raises ContractError for a message that is not one, DrainedError when the worker shuts down first, and
        ServiceUnavailableError when Redis or S3 stays away; in the last two cases nothing is lost by running it again.
        """
        message = decode_message(payload)
        if self._draining:
            raise DrainedError
        if message.shard is not None:
            return self._handle_shard(message, message.shard)
        return self._handle_single(message)

    def cancel(self, name: str) -> None:
        """Stop a job, or all jobs of a run, by id."""
        with self._lock:
            for context in self._jobs.values():
                if name in (context.id, context.run_id):
                    context.cancelled = True

    def drain(self, seconds: float) -> None:
        """Take no more jobs; give the started ones `seconds` to finish, then hand the rest back."""
        self._draining = True
        deadline = time.monotonic() + seconds
        while self._jobs and time.monotonic() < deadline:
            time.sleep(0.05)
        with self._lock:
            for context in self._jobs.values():
                context.give_back(DrainedError())

    def _handle_single(self, message: JobMessage) -> str:
        reporter = self._outlets.reporter
        refusal = self._refusal(message)
        if refusal is None and len(message.items) != 1:
            refusal = JobFailure("bad_contract", "a job without a shard carries one item", "consume")
        if refusal is not None:
            reporter.fail(message, refusal)
            return "failed"
        if not reporter.start(message):
            return "ended before"
        (outcome,) = self._run(message, list(message.items), None)
        try:
            reporter.finish(message, outcome)
        except ItemError as error:
            reporter.fail(message, error.failure)
            return "failed"
        return "succeeded" if outcome.failure is None else outcome.failure.code

    def _handle_shard(self, message: JobMessage, shard: Shard) -> str:
        reporter, layout = self._outlets.reporter, RunLayout(shard.run_uri)
        if not lies_under(shard.run_uri, self._outlets.allowed):
            raise ContractError(f"the output {shard.run_uri} lies outside what this worker may write")
        if reporter.run_cancelled(shard):
            return "cancelled"
        if self._outlets.store.exists(layout.part(shard.index)):
            self._close_shard(shard)
            return "ended before"
        items = self._read_shard(shard)
        refusal = self._refusal(message)
        outcomes = self._refused(message, items, refusal) if refusal else self._run(message, items, shard)
        if reporter.run_cancelled(shard):
            return "cancelled"
        reporter.progress(shard, outcomes)
        self._outlets.parts.write(shard, outcomes)
        self._close_shard(shard)
        return "succeeded"

    def _close_shard(self, shard: Shard) -> None:
        """The part is there, ours or another's: list its failures, note it, and end the run if it was the last."""
        layout = RunLayout(shard.run_uri)
        part = self._outlets.store.get(StorageRef(layout.part(shard.index)))
        if b'"error":' in part:
            rows = [json.loads(line) for line in part.splitlines()]
            write_failed_rows(self._outlets.objects, layout, shard.index, rows)
        if self._outlets.reporter.part_written(shard):
            finalise(self._outlets.objects, layout, read_plan(self._outlets.objects, layout))

    def _read_shard(self, shard: Shard) -> list[JobItem]:
        try:
            lines = self._outlets.store.get(StorageRef(shard.uri)).splitlines()
        except ObjectMissingError:
            raise ContractError(f"the shard {shard.uri} is not there; was the output of the run removed?") from None
        items = [decode_shard_line(line)[1] for line in lines]
        if len(items) != shard.count:
            raise ContractError(f"the shard {shard.uri} has {len(items)} items instead of {shard.count}")
        return items

    def _run(self, message: JobMessage, items: Sequence[JobItem], shard: Shard | None) -> list[Outcome]:
        """Send items through the engine; their outcomes in order. Raises DrainedError."""
        sink = Outcomes(len(items))
        context = JobContext(
            id=message.id,
            run_id=shard.run_id if shard else None,
            parameters={**self._pool.parameters, **message.parameters},
            priority=int(Priority.LOW if shard else Priority.NORMAL),
            deadline=message.deadline,
            sink=sink,
        )
        works = [_work(context, position, item) for position, item in enumerate(items)]
        with self._lock:
            self._jobs[id(context)] = context
        admitted: list[Work] = []
        try:
            self._admit(context, works, admitted, bulk=shard is not None)
            self._wait(sink, shard)
        finally:
            with self._lock:
                del self._jobs[id(context)]
            if shard is not None:
                self._engine.release(admitted)
        return sink.in_order()

    def _admit(self, context: JobContext, works: list[Work], admitted: list[Work], *, bulk: bool) -> None:
        for work in works:
            failure = self._item_failure(work)
            if failure is None:
                admitted.append(work)
            else:
                context.sink.deliver(Outcome(work, failure=failure))
        if not bulk:
            self._engine.admit(admitted, bulk=False)
            return
        with self._one_shard_at_a_time:  # the shard that came first gets its items in first
            self._engine.admit(admitted, bulk=True)

    def _item_failure(self, work: Work) -> JobFailure | None:
        """Why an item must not enter the engine, or None: parameters and references come from any program that can queue."""
        try:
            self._spec.check(work.item.parameters)
            refs_in(work.item.inputs)
        except PipefleetError as error:
            return JobFailure(error.code, str(error), "consume")
        return None

    def _wait(self, sink: Outcomes, shard: Shard | None) -> None:
        while not sink.complete:
            new = sink.wait(PROGRESS_SECONDS)
            if sink.abandoned is not None:
                raise sink.abandoned
            if shard is not None and not sink.complete:
                self._outlets.reporter.progress(shard, new)

    def _refusal(self, message: JobMessage) -> JobFailure | None:
        """Why this worker must not run a job, or None."""
        served = model_label(self._pool.model, self._pool.revision)
        wanted = model_label(message.model or "", message.revision)
        if message.task != self._pool.task or (message.model is not None and wanted != served):
            text = f"the job wants {message.task} with {wanted or 'any model'}, this worker serves {self._pool.task} with {served}"
            return JobFailure("wrong_pool", text, "consume")
        if message.output is not None and not lies_under(message.output, self._outlets.allowed):
            return JobFailure("forbidden", f"{message.output} lies outside what this worker may write", "consume")
        try:
            self._spec.check(message.parameters)
        except PipefleetError as error:
            return JobFailure(error.code, str(error), "consume")
        return None

    def _refused(self, message: JobMessage, items: Sequence[JobItem], refusal: JobFailure) -> list[Outcome]:
        context = JobContext(message.id, None, {}, int(Priority.LOW), None, Outcomes(len(items)))
        return [Outcome(_work(context, position, item), failure=refusal) for position, item in enumerate(items)]


def _work(context: JobContext, position: int, item: JobItem) -> Work:
    try:
        references = refs_in(item.inputs)
    except ContractError:
        references = []  # refused on admission
    inline = len(item.inputs) if isinstance(item.inputs, str) else 256
    weight = sum(UNKNOWN_BYTES if one.size is None else one.size for one in references) or inline
    parameters = {**context.parameters, **item.parameters} if item.parameters else context.parameters
    return Work(context, position, item, parameters, weight)
