"""report: states, progress and results in Redis, written after the result itself lies where it belongs. Acks come after this."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pipefleet import broker
from pipefleet.contract import JobMessage, JobState, Shard, encode_json
from pipefleet.records import FINISH, START, JobFailure, finish_arguments
from pipefleet.settings import Settings
from pipefleet.storage import StorageRef, join_uri
from pipefleet_workers.items import Outcome
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


class Reporter:
    """Writes what clients read. Thread-safe. All methods raise ServiceUnavailableError when Redis or S3 is away."""

    def __init__(self, redis: Any, store: WorkerStore, settings: Settings, *, worker: str) -> None:
        self._redis = redis
        self._store = store
        self._artifacts = ArtifactWriter(store)
        self._settings = settings
        self._worker = worker

    def start(self, message: JobMessage) -> bool:
        """Mark a single job as running. False when it has ended already: cancelled, or finished elsewhere."""
        arguments = [time.time(), self._worker, int(self._settings.result_ttl)]
        with broker.redis_errors(self._settings.redis_url):
            return bool(self._redis.eval(START, 1, broker.job_key(message.id), *arguments))

    def finish(self, message: JobMessage, outcome: Outcome) -> bool:
        """Bring a single job to its final state, its result stored first. False when it had one already."""
        failure = outcome.failure
        timings = encode_json({stage: round(value, 6) for stage, value in outcome.work.seconds.items()})
        if failure is not None:
            return self.fail(message, failure, timings=timings)
        artifacts = join_uri(self._settings.store, "results", message.id)
        body = dumps(self._artifacts.store(outcome.output, artifacts))
        fields = {**self._result_fields(message, body), "timings": timings}
        return self._end(message, JobState.SUCCEEDED, fields)

    def fail(self, message: JobMessage, failure: JobFailure, *, timings: str = "{}") -> bool:
        """End a single job without a result."""
        states = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}
        fields = {"error": encode_json(failure.to_json()), "timings": timings}
        return self._end(message, states.get(failure.code, JobState.FAILED), fields)

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
        """Whether the run of a shard was cancelled."""
        with broker.redis_errors(self._settings.redis_url):
            return bool(self._redis.hexists(broker.run_key(shard.run_id), "cancelled"))

    def _result_fields(self, message: JobMessage, body: bytes) -> dict[str, Any]:
        """The result itself, or a reference to it where it is long or was asked for under a URI."""
        uri = message.output
        if uri is not None and uri.endswith("/"):
            uri = join_uri(uri, f"{message.id}.json")
        if uri is None and len(body) <= self._settings.inline_bytes:
            return {"output": body}
        uri = uri or join_uri(self._settings.store, "results", f"{message.id}.json")
        self._store.put(uri, body, content_type="application/json")
        reference = StorageRef(uri, size=len(body), type="application/json")
        return {"output_ref": encode_json(reference.to_json())}

    def _end(self, message: JobMessage, state: JobState, fields: dict[str, Any]) -> bool:
        ttl, key = self._settings.result_ttl, broker.job_key(message.id)
        arguments = finish_arguments(message.id, state, time.time(), ttl=ttl, reply=message.reply, fields=fields)
        with broker.redis_errors(self._settings.redis_url):
            return bool(self._redis.eval(FINISH, 1, key, *arguments))
