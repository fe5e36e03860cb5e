"""`Client`, the one class a user meets: submit single jobs, start bulk runs, open either again.

submit → route → prepare inputs → record + queue (one round trip) → Job
map    → route → plan shards in object storage → queue them       → Run
"""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from pipefleet import broker, jobs
from pipefleet.contract import CONTRACT_VERSION, JobItem, JobMessage, JobState, Priority
from pipefleet.errors import InputError, JobError, RunError
from pipefleet.fleet import Fleet, Pool, load_fleet
from pipefleet.inputs import InputPreparer
from pipefleet.jobs import Job, Watcher
from pipefleet.layout import RunLayout, RunPlan
from pipefleet.objects import ObjectStore
from pipefleet.records import JobRecord, read_record
from pipefleet.routing import queue_name, route
from pipefleet.runs import Run, plan_run
from pipefleet.settings import Settings, load_settings
from pipefleet.storage import split_uri
from pipefleet.tasks import TaskSpec, task_spec

FORMATS = ("jsonl",)


class Client:
    """A producer. Thread-safe; opens its connections when they are first needed; a context manager.

    Settings come from the environment (see `pipefleet.settings`) unless they are passed.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings()
        self.store = ObjectStore()
        self.redis = broker.connect(self.settings)
        self._channel = broker.reply_channel(uuid.uuid4().hex)
        self.watcher = Watcher(self.redis, self._channel, self.settings.redis_url)
        self._runs: list[Run] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish planning what `map` has begun, then close the connections. May be called twice."""
        for run in self._runs:
            run.join_planner()
        self.watcher.close()
        self.redis.close()

    def submit(
        self,
        task: str,
        inputs: Any,
        *,
        model: str | None = None,
        revision: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        output: str | None = None,
        priority: str = "normal",
        expires: float | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Queue one input and return at once.

        `inputs` is what the pipeline call takes for one input; `expires` is in seconds from now; `output` is an `s3://` URI
        (or prefix ending in a slash) where the result is written as JSON as well. With `idempotency_key`, a second
        call within a day returns the first call's job. Raises UsageError or ServiceUnavailableError; nothing is queued then.

        >>> client.submit("text-classification", "I like it").result(timeout=30)  # doctest: +SKIP
        [{'label': 'POSITIVE', 'score': 0.999}]
        """
        spec, pool = self.route(task, model, revision)
        spec.check(parameters or {})
        if output is not None:
            split_uri(output)
        if expires is not None and expires <= 0:
            raise InputError("expires must be above 0 seconds")
        preparer = self.preparer(spec)
        job_id = uuid.uuid4().hex
        message = JobMessage(
            id=job_id,
            task=spec.name,
            model=pool.model,
            revision=pool.revision,
            parameters=parameters or {},
            items=(JobItem("0", preparer.spill(preparer.prepare(inputs))),),
            output=output,
            deadline=None if expires is None else time.time() + expires,
            reply=self._channel,
        )
        return self._enqueue(message, queue_name(pool, self.fleet), Priority.named(priority), idempotency_key)

    def map(
        self,
        task: str,
        source: Any,
        *,
        output: str,
        model: str | None = None,
        revision: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        shard_size: int | None = None,
        format: str = "jsonl",
    ) -> Run:
        """Run a task over a whole source, from object storage to object storage.

        `source` is an `s3://bucket/prefix/`, a manifest (`.jsonl` or `.csv`) there or here, a local folder, or any iterable of
        inputs. Returns when the first shard is queued; planning goes on in a thread that `close` waits for. `shard_size`
        bounds the items of a shard (default: growing from 16 to 512). Raises UsageError for anything wrong with the
        arguments, the source or the output, before anything is written.
        """
        spec, pool = self.route(task, model, revision)
        spec.check(parameters or {})
        if format not in FORMATS:
            raise RunError(f"format must be one of {', '.join(FORMATS)}, not {format[:40]!r}")
        if shard_size is not None and shard_size < 1:
            raise RunError("shard_size must be at least 1")
        layout = RunLayout.at(output)
        plan = RunPlan(
            id=uuid.uuid4().hex,
            task=spec.name,
            model=pool.model,
            revision=pool.revision,
            parameters=dict(parameters or {}),
            source=None,
            queue=queue_name(pool, self.fleet),
            format=format,
            shard_size=shard_size,
            created=time.time(),
            contract_version=CONTRACT_VERSION,
        )
        run = plan_run(self, layout, plan, source)
        self._runs.append(run)
        return run

    def run(self, uri: str) -> Run:
        """Open the run whose output lies at `uri`. Raises RunError where there is none."""
        return Run.open(self, RunLayout.at(uri))

    def job(self, job_id: str) -> Job:
        """The handle of a job that was submitted elsewhere or earlier."""
        return Job(self, job_id)

    def route(self, task: str, model: str | None, revision: str | None) -> tuple[TaskSpec, Pool]:
        """The row of `task` and the pool that serves it. Raises UnknownTaskError or UnknownModelError."""
        spec = task_spec(task)
        return spec, route(spec.name, model, revision, self.fleet)

    @functools.cached_property
    def fleet(self) -> Fleet:
        """The fleet: from the fleet file where there is one, else what the workers announce."""
        path = self.settings.fleet_path
        if path is not None:
            return load_fleet(path, allow_unpinned=True)  # the workers decide what is pinned
        with broker.redis_errors(self.settings.redis_url):
            announced = broker.announced_pools(self.redis)
        return Fleet({name: Pool(name=name, **fields) for name, fields in announced.items()})

    def preparer(self, spec: TaskSpec) -> InputPreparer:
        """What turns a user's inputs for this task into JSON with references."""
        return InputPreparer(spec, self.store, self.settings.store, inline_bytes=self.settings.inline_bytes)

    def read_records(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """The records of jobs, in one round trip; None for those nothing is known of."""
        pipe = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.hgetall(broker.job_key(job_id))
        with broker.redis_errors(self.settings.redis_url):
            return [read_record(raw) for raw in pipe.execute()]

    def output_of(self, job_id: str, record: JobRecord) -> Any:
        """The output of a record in a final state. Raises the error of a job that ended without one."""
        jobs.raise_for(job_id, record)
        self.watcher.forget(job_id)
        if record.output_ref is not None:
            return jobs.decode_output(self.store.get(record.output_ref.uri))
        if record.output is None:
            raise JobError(f"the record of job {job_id} holds no output")
        return jobs.decode_output(record.output)

    def cancel_job(self, job_id: str) -> bool:
        """See `Job.cancel`."""
        with broker.redis_errors(self.settings.redis_url):
            return jobs.cancel(self.redis, job_id, ttl=self.settings.result_ttl, reply=self._channel)

    def publish(self, messages: Iterable[JobMessage], queue: str, priority: Priority) -> None:
        """Queue messages in one round trip. Raises ServiceUnavailableError; then none or all of them are queued."""
        pipe = self.redis.pipeline(transaction=True)
        for message in messages:
            broker.push(pipe, message, queue, priority)
        with broker.redis_errors(self.settings.redis_url):
            pipe.execute()

    def _enqueue(self, message: JobMessage, queue: str, priority: Priority, key: str | None) -> Job:
        ttl = int(self.settings.result_ttl)
        if key is not None:
            with broker.redis_errors(self.settings.redis_url):
                known = self.redis.set(broker.idempotency_key(key), message.id, nx=True, ex=ttl, get=True)
            if isinstance(known, bytes):
                return Job(self, known.decode())
        self.watcher.watch(message.id, submitting=True)
        pipe = self.redis.pipeline(transaction=True)
        for name, value in {"state": JobState.QUEUED, "task": message.task, "queue": queue}.items():
            pipe.hset(broker.job_key(message.id), name, str(value))
        pipe.hset(broker.job_key(message.id), "submitted", str(time.time()))
        pipe.expire(broker.job_key(message.id), ttl)
        broker.push(pipe, message, queue, priority)
        with broker.redis_errors(self.settings.redis_url):
            pipe.execute()
        return Job(self, message.id)
