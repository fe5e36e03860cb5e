"""`Client`, the one class a user meets: submit single jobs, start bulk runs, open either again.

submit → route → prepare inputs → record + queue (one round trip) → Job
map    → route → plan shards in object storage → queue them       → Run
"""

from __future__ import annotations

import math
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, NoReturn, Self, cast

from pipefleet import broker, jobs, tracecontext
from pipefleet.announcements import announced_fleet
from pipefleet.arguments import seconds_of, text_of, whole_of
from pipefleet.artifacts import resolve
from pipefleet.called import called_parameters, layered
from pipefleet.clock import ServerClock
from pipefleet.contract import CONTRACT_VERSION, MAX_DEADLINE, MAX_SHARD_ITEMS, JobItem, JobMessage, JobState, Priority
from pipefleet.errors import ConflictError, InputError, JobError, RunError, UnknownModelError
from pipefleet.fleet import Fleet, Pool
from pipefleet.fleetfile import FleetFile
from pipefleet.forking import renew_after_fork
from pipefleet.identity import Membership
from pipefleet.inputs import InputPreparer
from pipefleet.jobs import Job
from pipefleet.layout import RunLayout, RunPlan
from pipefleet.losses import Losses
from pipefleet.modelnames import model_name
from pipefleet.objects import ObjectStore
from pipefleet.parts import FORMATS, JsonLines
from pipefleet.patience import Patience
from pipefleet.records import CANCEL, SUBMIT, JobRecord, finish_arguments, read_record, request_digest
from pipefleet.routing import route, work_queue
from pipefleet.runs import Run
from pipefleet.settings import Settings, load_settings
from pipefleet.starting import plan_run
from pipefleet.storage import REF_KEY
from pipefleet.tasks import TaskSpec, implied_parameters, task_spec
from pipefleet.tasks.requirements import Known
from pipefleet.uris import output_fault, run_fault
from pipefleet.waiting import Lookout
from pipefleet.watcher import Watcher
from pipefleet.writers import require_writer

ANNOUNCED_SECONDS = 5.0
"""How long what the workers announce is taken as it was read."""
NOTED_SECONDS = 10.0
"""How often a client that submits single jobs notes which revision their queue is for."""


class Client:
    """A producer. Thread-safe; opens its connections when they are first needed; a context manager.

    Settings come from the environment (see `pipefleet.settings`) unless they are passed.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self.store = ObjectStore()
        self.redis = broker.connect(self.settings)
        self.clock = ServerClock(self.redis)
        """The clock that deadlines and records are told in."""
        self._membership = Membership(self.redis, self.store, self.settings)
        self._lookout = Lookout(self.redis)
        self.losses = Losses(self.redis, self.settings.redis_url)
        """Shards of runs that Redis has lost."""
        self.watcher = Watcher(self.redis, self.settings.redis_url, self._lookout)
        self._planning: list[Run] = []
        self._fleet_file: FleetFile | None = None
        self._note_at: dict[str, float] = {}
        self._announced: Fleet | None = None
        self._announced_until = 0.0
        self._lock = threading.Lock()
        renew_after_fork(self)

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
        """Finish planning what `map` has begun, then close the connections. May be called twice.

        A `with` block that ends with an exception stops the planning instead; such a run can be resumed.
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

        `inputs` is what the pipeline call takes for one input; `expires` is in seconds from now; `output` is an `s3://` URI
        (or prefix ending in a slash) where the result is written as JSON as well, and lies inside of no run. With
        `idempotency_key`, a second call within a day that asks for the same returns the first call's job, whatever its
        `priority` and `expires`; one that asks for something else (task, inputs, model, revision, parameters or output) raises
        ConflictError. Raises UsageError or ServiceUnavailableError; after the former nothing is queued, after the latter at
        most once.

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
    ) -> Job:
        """As `submit`, where each step is repeated as `patience` has it. The job is queued once."""
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
        )
        once = None if idempotency_key is None else Once(idempotency_key, _digest(message, model, revision))
        queue = work_queue(pool, patience.call(lambda: self.fleet))
        self._lookout.name(queue, pool)
        with tracecontext.submitting(spec.name, job_id):
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
        `.gz`) there or here, a local folder, or any iterable of
        inputs. Returns when the first shard is queued; planning goes on in a thread that `close` waits for. `shard_size`
        bounds the items of a shard, from 1 to 10,000 (default: growing from 16 to 512). `format` is that of the parts: `jsonl`,
        or `parquet`, where embeddings are vectors (it needs pyarrow here and on the workers).

        An item that cannot be prepared (null, of a wrong type, a local file that is missing …) is a failed item of the run, code
        `bad_input`, stage `plan`; with `strict` it ends the planning instead, with an InputError that names its row. Raises
        UsageError for anything wrong with the arguments, the source or the output, and leaves nothing behind then;
        ServiceUnavailableError when Redis or S3 is away.
        """
        model = model_name(model)
        spec, pool = self.route(task, model, revision)
        parameters = _checked(task, spec, parameters)
        if text_of("format", format) not in FORMATS:
            raise RunError(f"format must be one of {', '.join(FORMATS)}, not {format[:40]!r}")
        FORMATS[format].require()
        if format != JsonLines.name:
            require_writer(self.redis, self.settings.redis_url, pool.name, format)
        shard_size = None if shard_size is None else whole_of("shard_size", shard_size)
        if shard_size is not None and not 1 <= shard_size <= MAX_SHARD_ITEMS:
            raise RunError(
                f"shard_size must be from 1 to {MAX_SHARD_ITEMS}, not {shard_size}: a worker holds a shard in memory"
            )
        layout = replace(RunLayout.at(output), format=format)
        layout.require_room()
        _require(run_fault(layout.uri, self.settings.store))
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

    def run(self, uri: str) -> Run:
        """Open the run whose output lies at `uri`. Raises RunError where there is none."""
        return Run.open(self, RunLayout.at(uri))

    def job(self, job_id: str) -> Job:
        """The handle of a job that was submitted elsewhere or earlier."""
        return Job(self, job_id)

    def route(self, task: str, model: str | None, revision: str | None) -> tuple[TaskSpec, Pool]:
        """The row of `task` and the pool that serves it. Raises UnknownTaskError or UnknownModelError."""
        spec = task_spec(task)
        try:
            return spec, route(spec.name, model, revision, self.fleet)
        except UnknownModelError:
            return spec, route(spec.name, model, revision, self._read_fleet(at_once=True))  # or it came a moment ago

    @property
    def fleet(self) -> Fleet:
        """The fleet: from the fleet file where there is one, else what the workers announce; both as of a moment ago."""
        return self._read_fleet()

    def _read_fleet(self, *, at_once: bool = False) -> Fleet:
        path = self.settings.fleet_path
        if path is not None:
            if self._fleet_file is None or self._fleet_file.path != path:
                self._fleet_file = FleetFile(path)
            return self._fleet_file.fleet(at_once=at_once)
        known = self._announced
        if known is None or at_once or time.monotonic() >= self._announced_until:
            self._announced_until = time.monotonic() + ANNOUNCED_SECONDS
            with broker.redis_errors(self.settings.redis_url):
                known = self._announced = announced_fleet(self.redis)
        return known

    def ping(self) -> None:
        """Raise ServiceUnavailableError unless Redis answers."""
        with broker.redis_errors(self.settings.redis_url):
            self.redis.ping()

    def preparer(
        self, spec: TaskSpec, pool: Pool | None = None, parameters: Mapping[str, Any] | None = None
    ) -> InputPreparer:
        """What turns a user's inputs for this task into JSON with references.

        With the pool and the parameters of a call, it refuses what cannot go with them. Workers that announce a pool do not tell
        its parameters, so only with a fleet file is it known that one is missing.
        """
        complete = pool is not None and self.settings.fleet_path is not None
        known = Known(layered(spec, pool.parameters if pool else {}, parameters or {}), complete)
        return InputPreparer(
            spec, self.store, self.settings.store, inline_bytes=self.settings.inline_bytes, known=known
        )

    def read_records(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """The records of jobs, in one round trip; None for those nothing is known of."""
        pipe = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hgetall(broker.job_key(job_id))
        with broker.redis_errors(self.settings.redis_url):
            return [read_record(raw) for raw in pipe.execute()]

    def output_of(self, job_id: str, record: JobRecord, *, resolved: bool = True) -> Any:
        """The output of a record in a final state, its artifacts read if `resolved`. Raises the error of a job that has none."""
        self.watcher.forget(job_id)
        jobs.raise_for(job_id, record)
        text = record.output if record.output_ref is None else self.store.get(record.output_ref.uri)
        if text is None:
            raise JobError(f"the record of job {job_id} holds no output")
        output = jobs.decode_output(text)
        return resolve(output, self.store.get) if resolved else output

    def cancel_job(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        ttl, key = self.settings.result_ttl, broker.job_key(job_id)
        reply = self.watcher.channel
        arguments = finish_arguments(job_id, JobState.CANCELLED, None, ttl=ttl, reply=reply, fields={})
        with broker.redis_errors(self.settings.redis_url):
            ended = bool(self.redis.eval(CANCEL, 1, key, *arguments))
            if ended:
                self.redis.publish(broker.CANCELLED_CHANNEL, job_id)
        return ended

    def publish(self, messages: Iterable[JobMessage], queue: str, priority: Priority) -> None:
        """Queue messages in one round trip. Raises ServiceUnavailableError; then none or all of them are queued."""
        self.check_fleet()
        pipe, now = self.redis.pipeline(transaction=True), self.now()
        for message in messages:
            broker.push(pipe, message, queue, priority, now=now)
        with broker.redis_errors(self.settings.redis_url):
            pipe.execute()

    def _enqueue(self, message: JobMessage, queue: str, priority: Priority, once: Once | None) -> Job:
        job = Job(self, message.id)
        keys = [broker.job_key(job.id), broker.queue_list(queue, priority)]
        keys += [] if once is None else [broker.idempotency_key(once.key)]
        fields = {"state": JobState.QUEUED, "task": message.task, "queue": queue}
        text = broker.celery_message(message, queue, priority, now=self.now())
        self.check_fleet(uses_store=message.output is not None or REF_KEY in text)
        arguments: list[Any] = [int(self.settings.result_ttl), job.id, text, once.digest if once else ""]
        arguments += [str(part) for pair in fields.items() for part in pair]
        future = job.watch(submitting=True)
        with broker.redis_errors(self.settings.redis_url):
            self._note_revision(message, queue)
            queued, same = cast("tuple[bytes, int]", self.redis.eval(SUBMIT, len(keys), *keys, *arguments))
        future.unknown_since = None  # a sweep may have been quicker
        if once is not None and not same:
            raise _conflict(once.key, queued.decode())
        return job if queued == job.id.encode() else Job(self, queued.decode())

    def check_fleet(self, *, uses_store: bool = True) -> None:
        """Raise FleetMismatchError where Redis belongs to another fleet; asked once. Without `uses_store`, only Redis is asked."""
        self._membership.check(uses_store=uses_store)

    def hold(self, run: Run) -> None:
        """Let `close` wait for the planning of a run."""
        with self._lock:
            self._planning = [*(one for one in self._planning if one.planning and one is not run), run]

    def now(self) -> float:
        """Seconds since 1970 by the Redis server's clock. Raises ServiceUnavailableError where it could never be asked."""
        with broker.redis_errors(self.settings.redis_url):
            return self.clock.now()

    def after_fork(self) -> None:
        """In a forked process: the connections and the planning of runs stay the parent's. See `pipefleet.forking`."""
        self._lock = threading.Lock()
        broker.renew_connections(self.redis, self.settings)
        self._planning = []

    def _note_revision(self, message: JobMessage, queue: str) -> None:
        """Note what a queue is for, now and then: Redis may have been emptied since."""
        now = time.monotonic()
        if now >= self._note_at.get(queue, 0.0):
            broker.note_revision(self.redis, queue, message.model, message.revision, now=self.clock.peek())
            self._note_at[queue] = now + NOTED_SECONDS

    def _runs_in_planning(self) -> list[Run]:
        with self._lock:
            return list(self._planning)


@dataclass(frozen=True, slots=True)
class Once:
    """An idempotency key, and the digest of the request that it stands for."""

    key: str
    digest: str


def _digest(message: JobMessage, model: str | None, revision: str | None) -> str:
    """The digest of a request: of the model as it was asked for, so a call stays the same when another becomes the default."""
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
    """Raise InputError that says why an output cannot be taken, where there is a reason."""
    if fault is not None:
        raise InputError(fault)


def _checked(task: str, spec: TaskSpec, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of a call with those that the task's name stands for. Raises ParameterError."""
    return layered(spec, implied_parameters(task), called_parameters(spec, parameters))
