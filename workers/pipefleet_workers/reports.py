"""report: states, progress and results in Redis, written after the result itself lies where it belongs. Acks come after this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipefleet import broker
from pipefleet.contract import JobMessage, JobState, Shard, encode_json
from pipefleet.errors import PipefleetError, ServiceUnavailableError
from pipefleet.layout import RunLayout
from pipefleet.records import FINISH, START, JobFailure, finish_arguments
from pipefleet.settings import Settings
from pipefleet.storage import StorageRef, join_uri
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.items import ItemError, Outcome
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.stages.artifacts import ArtifactWriter
from pipefleet_workers.stages.write import dumps

PROGRESS = """
for group = 2, 3 do
  for _, place in ipairs(cjson.decode(ARGV[group])) do
    redis.call('SETBIT', KEYS[1], place, 1)
    redis.call('SETBIT', KEYS[2], place, group - 2)
  end
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[1]) end
"""
"""KEYS: the bitmaps items and failed. ARGV: ttl, JSON lists of succeeded and of failed positions. One script, since two commands
for each item take far more of this process's time."""

COUNT = """
for i = 1, #ARGV - 1, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HINCRBY', KEYS[2], ARGV[i], ARGV[#ARGV]) end
end
"""
"""KEYS: owners and deliveries of a queue. ARGV: tag, owner, …, and by how much each of these counts more, if it is still theirs."""


class Reporter:
    """Writes what clients read. Thread-safe. All methods raise ServiceUnavailableError when Redis or S3 is away."""

    def __init__(self, redis: Any, store: WorkerStore, settings: Settings, *, worker: str) -> None:
        self._redis = redis
        self._store = store
        self._artifacts = ArtifactWriter(store)
        self._settings = settings
        self._worker = worker

    @property
    def store_uri(self) -> str:
        """The prefix under which long results lie."""
        return self._settings.store

    def ping(self) -> None:
        """Ask Redis whether it is there."""
        with broker.redis_errors(self._settings.redis_url):
            self._redis.ping()

    def count_deliveries(self, leases: Sequence[Lease], by: int) -> None:
        """Count each of these messages as delivered `by` times more; those that were lost meanwhile stay as they are."""
        for queue in {lease.queue for lease in leases}:
            keys = broker.unacked_keys(queue)
            fences = [part for lease in leases if lease.queue == queue for part in (lease.tag, lease.owner)]
            with broker.redis_errors(self._settings.redis_url):
                self._redis.eval(COUNT, 2, keys["owners_key"], keys["deliveries_key"], *fences, by)

    def start_many(self, messages: Sequence[JobMessage]) -> list[bool]:
        """Mark single jobs as running. False for each that has ended already: cancelled, or finished elsewhere."""
        pipe = self._redis.pipeline(transaction=False)
        arguments = ["", self._worker, int(self._settings.result_ttl)]  # the server's time
        for message in messages:
            pipe.eval(START, 1, broker.job_key(message.id), *arguments)
        with broker.redis_errors(self._settings.redis_url):
            return [bool(one) for one in pipe.execute()]

    def finish_many(self, ends: Sequence[tuple[JobMessage, Outcome]]) -> list[str | Exception]:
        """Bring single jobs to their final states, results stored first. The state each reached, or why it has none yet."""
        pipe = self._redis.pipeline(transaction=False)
        states: list[str | Exception] = []
        for message, outcome in ends:
            try:
                state, fields = self._fields(message, outcome)
            except PipefleetError as error:
                states.append(error)
                continue
            self._finish(pipe, message, state, fields)
            states.append(str(state))
        try:
            with broker.redis_errors(self._settings.redis_url):
                pipe.execute()
        except ServiceUnavailableError as error:
            return [error] * len(states)
        return states

    def fail(self, message: JobMessage, failure: JobFailure) -> None:
        """End a single job that never came into the engine."""
        fields = {"error": encode_json(failure.to_json()), "timings": "{}"}
        with broker.redis_errors(self._settings.redis_url):
            self._finish(self._redis, message, JobState.FAILED, fields)

    def progress(self, shard: Shard, outcomes: Sequence[Outcome]) -> None:
        """Set the bits of items that have ended, in one command."""
        if not outcomes:
            return
        keys = [broker.run_key(shard.run_id, name) for name in ("items", "failed")]
        places = [(shard.first + outcome.work.position, outcome.failure is not None) for outcome in outcomes]
        failed = [place for place, has_failed in places if has_failed]
        succeeded = [place for place, has_failed in places if not has_failed]
        arguments = [int(self._settings.run_ttl), encode_json(succeeded), encode_json(failed)]
        with broker.redis_errors(self._settings.redis_url):
            self._redis.eval(PROGRESS, len(keys), *keys, *arguments)

    def part_written(self, shard: Shard) -> bool:
        """Note that a shard's part is there. True when it was the last one of a run that is planned to its end."""
        parts = broker.run_key(shard.run_id, "parts")
        pipe = self._redis.pipeline(transaction=True)
        pipe.setbit(parts, shard.index, 1)
        pipe.expire(parts, int(self._settings.run_ttl))
        pipe.bitcount(parts)
        pipe.hget(broker.run_key(shard.run_id), "shards")
        with broker.redis_errors(self._settings.redis_url):
            *_, written, shards = pipe.execute()
        return shards is not None and written >= int(shards)

    def run_cancelled(self, shard: Shard) -> bool:
        """Whether the run of a shard was cancelled; where Redis knows nothing of the run, the store is asked."""
        key = broker.run_key(shard.run_id)
        pipe = self._redis.pipeline(transaction=False)
        pipe.hexists(key, "cancelled")
        pipe.exists(key)
        with broker.redis_errors(self._settings.redis_url):
            cancelled, known = pipe.execute()
        return bool(cancelled) or (not known and self._store.exists(RunLayout(shard.run_uri).cancelled))

    def _finish(self, commands: Any, message: JobMessage, state: JobState, fields: dict[str, Any]) -> None:
        """Bring a job to its final state through `commands`: the client itself, or one of its pipelines."""
        arguments = finish_arguments(
            message.id, state, None, ttl=self._settings.result_ttl, reply=message.reply, fields=fields
        )
        commands.eval(FINISH, 1, broker.job_key(message.id), *arguments)

    def _fields(self, message: JobMessage, outcome: Outcome) -> tuple[JobState, dict[str, Any]]:
        """The final state of a job, and what its record says beside it. Raises what the store raises."""
        failure, fields = outcome.failure, dict[str, Any]()
        if failure is None:
            try:
                fields = self._result_fields(message, outcome.output)
            except ItemError as error:
                failure = error.failure
            except PipefleetError as error:
                if error.retryable:
                    raise
                failure = JobFailure(error.code, str(error), "write")
        timings = encode_json({stage: round(value, 6) for stage, value in outcome.work.seconds.items()})
        if failure is not None:
            state = _FAILED_STATES.get(failure.code, JobState.FAILED)
            return state, {"error": encode_json(failure.to_json()), "timings": timings}
        return JobState.SUCCEEDED, {**fields, "timings": timings}

    def _result_fields(self, message: JobMessage, output: Any) -> dict[str, Any]:
        """The result itself, or a reference to it where it is long or was asked for under a URI."""
        body = dumps(self._artifacts.store(output, join_uri(self._settings.store, "results", message.id)))
        if message.output is None and len(body) <= self._settings.inline_bytes:
            return {"output": body}
        uri, size = self._put_result(message, body)
        return {"output_ref": encode_json(StorageRef(uri, size=size, type="application/json").to_json())}

    def _put_result(self, message: JobMessage, body: bytes) -> tuple[str, int | None]:
        """Where the result lies, and its size unless another worker was first: what is named after the job is written once."""
        uri = message.output
        if uri is not None and not uri.endswith("/"):
            self._store.put(uri, body, content_type="application/json")
            return uri, len(body)
        folder = (self._settings.store, "results") if uri is None else (uri,)
        own = join_uri(*folder, f"{message.id}.json")
        ours = self._store.put_new(own, body, content_type="application/json")
        return own, len(body) if ours else None


_FAILED_STATES = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}
