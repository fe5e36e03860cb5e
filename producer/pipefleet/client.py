"""`Client`, the class that users make: submit single jobs, start bulk runs, open either again.

submit → route → prepare inputs → record + queue (one round trip) → Job
map    → route → plan shards in object storage → queue them       → Run

Both raise UsageError before anything is queued, and ServiceUnavailableError when Redis or S3 is away.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from pipefleet.arguments import seconds_of, text_of, whole_of
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.scripts import run_script
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import (
    CONTRACT_VERSION,
    MAX_DEADLINE,
    MAX_SHARD_ITEMS,
    JobItem,
    JobMessage,
    JobState,
    Priority,
)
from pipefleet.contract.parts import FORMATS, JsonLines
from pipefleet.contract.records import HEARS, RECORD, SUBMIT, request_digest
from pipefleet.contract.references import REF_KEY
from pipefleet.contract.uris import output_fault, run_fault
from pipefleet.errors import ConflictError, InputError, RunError
from pipefleet.fleet.model_names import model_name
from pipefleet.fleet.routing import work_queue
from pipefleet.fleet.writers import require_writer
from pipefleet.jobs.job import Job
from pipefleet.patience import Patience
from pipefleet.queues import trace_context
from pipefleet.queues.celery import celery_message
from pipefleet.queues.keys import idempotency_key, job_key, queue_list
from pipefleet.queues.revision_notes import note_revision
from pipefleet.runs.run import Run
from pipefleet.runs.start import plan_run
from pipefleet.session import Session
from pipefleet.settings import Settings, load_settings
from pipefleet.tasks import TaskSpec, implied_parameters
from pipefleet.tasks.parameters import called_parameters, layered

NOTED_SECONDS = 10.0
"""Seconds after which a client that submits single jobs notes again which revision their queue is for."""


class Client(Session):
    """A producer. Thread-safe; a context manager; it opens its connections when they are first needed.

    Settings come from the environment (see `pipefleet.settings`) unless they are passed.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings or load_settings())
        self._note_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for run in self._runs_in_planning():
                run.stop_planning()
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a client holds connections, so neither it nor its pipelines, jobs and runs can be pickled: make one in each process, "
            "and open a run by its URI, a job by its id; a client may be used before and after os.fork()"
        )

    def close(self) -> None:
        """Wait for the planning that `map` has begun, then close the connections. May be called twice.

        A `with` block that ends with an exception stops the planning instead; its runs can be resumed.
        """
        for run in self._runs_in_planning():
            run.join_planner()
        self.watcher.close()
        self.redis.close()

    def submit(
        self,
        task: str,
        inputs: Any,
        *,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        output: str | None = None,
        priority: str = "normal",
        expires: float | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Queue one input and return at once.

        `inputs` is one input of the pipeline call. `expires` is in seconds from now. `output` is an `s3://` URI outside of any
        run, or a prefix with a slash at its end, where the result is written as JSON too. With `idempotency_key`, a second call
        within a day for the same request returns the first call's job, for any `priority` and `expires`; a call for another
        request (task, inputs, model, revision, parameters or output) raises ConflictError.

        Raises UsageError, and then nothing is queued; or ServiceUnavailableError, and then the job is queued at most once.

        >>> client.submit("text-classification", "I like it").result(timeout=30)  # doctest: +SKIP
        [{'label': 'POSITIVE', 'score': 0.999}]
        """
        return self.submit_patiently(
            Patience(),
            task,
            inputs,
            model=model,
            revision=revision,
            parameters=parameters,
            output=output,
            priority=priority,
            expires=expires,
            idempotency_key=idempotency_key,
        )

    def submit_patiently(
        self,
        patience: Patience,
        task: str,
        inputs: Any,
        *,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        output: str | None = None,
        priority: str = "normal",
        expires: float | None = None,
        idempotency_key: str | None = None,
        stream: bool = False,
    ) -> Job:
        """As `submit`, but `patience` repeats each step while a service is away. The job is queued once.

        With `stream` the worker tells the text while it writes it; a `TextStream` reads it.
        """
        model = model_name(model)
        spec, pool = patience.call(lambda: self.route(task, model, revision))
        parameters = _checked(task, spec, parameters)
        job_id = uuid.uuid4().hex
        if output is not None:
            _require(output_fault(text_of("output", output), job_id, self.settings.store))
        if expires is not None:
            expires = seconds_of(expires)
            if expires is None or not 0 < expires < math.inf:
                raise InputError("expires must be above 0 seconds, a finite number")
        if not isinstance(idempotency_key, str | None):
            raise InputError(f"idempotency_key must be a text, not {type(idempotency_key).__name__}")
        deadline = None if expires is None else patience.call(self.now) + expires
        if deadline is not None and deadline > MAX_DEADLINE:
            raise InputError("expires must end before the year 2100; leave it out for a job that never expires")
        preparer = self.preparer(spec, pool, parameters)
        message = JobMessage(
            id=job_id,
            task=spec.name,
            model=pool.model,
            revision=pool.revision,
            parameters=parameters,
            items=(JobItem("0", patience.call(lambda: preparer.spill(preparer.prepare(inputs)))),),
            output=output,
            deadline=deadline,
            reply=self.watcher.channel,
            stream=stream,
        )
        once = None if idempotency_key is None else Once(idempotency_key, _digest(message, model, revision))
        queue = work_queue(pool, patience.call(lambda: self.fleet))
        self._lookout.name(queue, pool)
        with trace_context.submitting(spec.name, job_id):
            return patience.call(lambda: self._enqueue(message, queue, Priority.named(priority), once))

    def map(
        self,
        task: str,
        source: Any,
        *,
        output: str,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        shard_size: int | None = None,
        format: str = "jsonl",
        strict: bool = False,
    ) -> Run:
        """Run a task over a whole source, from object storage to object storage.

        `source` is an `s3://bucket/prefix/`, a manifest (`.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.txt`, each also with
        `.gz`) there or here, a local folder, or any iterable of inputs. Returns when the first shard is queued; planning goes on
        in a thread that `close` waits for. `shard_size` bounds the items of a shard, from 1 to 10,000 (default: growing from 16
        to 512). `format` is the format of the parts:
        `jsonl`, or `parquet`, where embeddings are vectors (it needs pyarrow here and on the workers).

        An item that cannot be prepared (null, a wrong type, a missing local file …) is a failed item of the run, with code
        `bad_input` and stage `plan`. With `strict` it ends the planning instead, with an InputError that names its row. Raises
        UsageError for a fault of the arguments, the source or the output, and then leaves nothing behind;
        ServiceUnavailableError when Redis or S3 is away.
        """
        model = model_name(model)
        spec, pool = self.route(task, model, revision)
        parameters = _checked(task, spec, parameters)
        _require_format(format)
        if format != JsonLines.name:
            require_writer(self.redis, self.settings.redis_url, pool.name, format)
        shard_size = _shard_size(shard_size)
        layout = self._layout(output, format)
        self.check_fleet()
        plan = RunPlan(
            id=uuid.uuid4().hex,
            task=spec.name,
            model=pool.model,
            revision=pool.revision,
            parameters=parameters,
            source=None,
            queue=work_queue(pool, self.fleet),
            format=format,
            shard_size=shard_size,
            created=self.now(),
            contract_version=CONTRACT_VERSION,
            strict=strict,
        )
        return plan_run(self, layout, plan, source, pool)

    def _layout(self, output: str, format: str) -> RunLayout:
        layout = replace(RunLayout.at(output), format=format)
        layout.require_room()
        _require(run_fault(layout.uri, self.settings.store))
        return layout

    def run(self, uri: str) -> Run:
        """Open the run whose output lies at `uri`. Raises RunError where there is no run."""
        return Run.open(self, RunLayout.at(uri))

    def job(self, job_id: str) -> Job:
        """The handle of a job that another client, or an earlier one, submitted."""
        return Job(self, job_id)

    def _enqueue(self, message: JobMessage, queue: str, priority: Priority, once: Once | None) -> Job:
        job = Job(self, message.id)
        keys = [job_key(job.id), queue_list(queue, priority)]
        keys += [] if once is None else [idempotency_key(once.key)]
        fields = {"state": JobState.QUEUED, "task": message.task, "queue": queue, HEARS: RECORD}
        text = celery_message(message, queue, priority, now=self.now())
        self.check_fleet(uses_store=message.output is not None or REF_KEY in text)
        arguments: list[Any] = [int(self.settings.result_ttl), job.id, text, once.digest if once else ""]
        arguments += [str(part) for pair in fields.items() for part in pair]
        future = job.watch(submitting=True)
        with redis_errors(self.settings.redis_url):
            self._note_revision(message, queue)
            queued, same = cast("tuple[bytes, int]", run_script(self.redis, SUBMIT, keys, *arguments))
        future.queued_at = time.monotonic()
        if once is not None and not same:
            raise _conflict(once.key, queued.decode())
        return job if queued == job.id.encode() else Job(self, queued.decode())

    def _note_revision(self, message: JobMessage, queue: str) -> None:
        """Note which revision a queue is for, once in NOTED_SECONDS: Redis may have been emptied since."""
        now = time.monotonic()
        if now >= self._note_at.get(queue, 0.0):
            note_revision(self.redis, queue, message.model, message.revision, now=self.clock.peek())
            self._note_at[queue] = now + NOTED_SECONDS


@dataclass(frozen=True, slots=True)
class Once:
    """An idempotency key, and the digest of its request."""

    key: str
    digest: str


def _digest(message: JobMessage, model: str | None, revision: str | None) -> str:
    """The digest of a request. It holds the model as the call names it, so it stays the same when the default model changes."""
    return request_digest(
        task=message.task,
        model=model,
        revision=revision,
        parameters=dict(message.parameters),
        inputs=message.items[0].inputs,
        output=message.output,
    )


def _conflict(key: str, job_id: str) -> ConflictError:
    text = f"the idempotency key {key[:80]!r} stands for another request, whose job is {job_id}; use a key of its own for each"
    return ConflictError(text, job_id=job_id)


def _require(fault: str | None) -> None:
    """Raise InputError with the fault of an output, if it has one."""
    if fault is not None:
        raise InputError(fault)


def _require_format(format: Any) -> None:
    """Raise RunError for an unknown format, or for one whose packages are missing here."""
    if text_of("format", format) not in FORMATS:
        raise RunError(f"format must be one of {', '.join(FORMATS)}, not {format[:40]!r}")
    FORMATS[format].require()


def _shard_size(value: Any) -> int | None:
    if value is None:
        return None
    size = whole_of("shard_size", value)
    if not 1 <= size <= MAX_SHARD_ITEMS:
        raise RunError(f"shard_size must be from 1 to {MAX_SHARD_ITEMS}, not {size}: a worker holds a shard in memory")
    return size


def _checked(task: str, spec: TaskSpec, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of a call over the parameters in the task's name. Raises ParameterError."""
    return layered(spec, implied_parameters(task), called_parameters(spec, parameters))
