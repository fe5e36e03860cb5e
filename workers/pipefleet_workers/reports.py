"""report: states, progress and results in Redis, written after the result itself lies where it belongs. Acks come after this."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from pipefleet import broker
from pipefleet.contract import JobMessage, JobState, Shard, encode_json
from pipefleet.errors import PipefleetError, ServiceUnavailableError
from pipefleet.layout import RunLayout
from pipefleet.records import FINISH, START, JobFailure, finish_arguments
from pipefleet.settings import Settings
from pipefleet.storage import StorageRef, join_uri
from pipefleet_workers.adapters.base import brief
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.items import Outcome
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.stages.write import body_of, utf8

log = logging.getLogger(__name__)
STORED_AT_ONCE = 8
"""Results of single jobs that are stored at once."""

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
        arguments = [time.time(), self._worker, int(self._settings.result_ttl)]
        for message in messages:
            pipe.eval(START, 1, broker.job_key(message.id), *arguments)
        with broker.redis_errors(self._settings.redis_url):
            return [bool(one) for one in pipe.execute()]

    def finish_many(self, ends: Sequence[tuple[JobMessage, Outcome]]) -> list[str | Exception]:
        """Bring single jobs to their final states, results stored first. The state each reached, or why it has none yet."""
        found = self._endings(ends)
        pipe = self._redis.pipeline(transaction=False)
        for (message, outcome), ending in zip(ends, found, strict=True):
            if not isinstance(ending, Exception):
                self._finish(pipe, message, *_record(ending, outcome))
        try:
            with broker.redis_errors(self._settings.redis_url):
                answers = iter(pipe.execute(raise_on_error=False))  # one that Redis refuses is not the others' affair
        except ServiceUnavailableError as error:
            return [error] * len(ends)
        return [one if isinstance(one, Exception) else self._state(one, next(answers)) for one in found]

    def _endings(self, ends: Sequence[tuple[JobMessage, Outcome]]) -> list[_Ending]:
        """How each job ends, its result stored where it is no part of the record: all at once, since each takes a round trip."""
        found: list[_Ending] = [_inline(body_of(outcome)) for _, outcome in ends]
        long = [place for place, (message, _) in enumerate(ends) if self._is_stored(message, found[place])]
        found_at = _side_by_side(lambda place: self._stored(ends[place][0], found[place]), long)
        return [found_at.get(place, ending) for place, ending in enumerate(found)]

    def _is_stored(self, message: JobMessage, ending: _Ending) -> bool:
        if not isinstance(ending, dict):
            return False
        return message.output is not None or len(ending["output"]) > self._settings.inline_bytes

    def _stored(self, message: JobMessage, ending: Any) -> _Ending:
        """Store a result. A service that is away is why the job has no state yet; whatever else happens is its failure."""
        try:
            uri, size = self._put_result(message, ending["output"])
            return {"output_ref": encode_json(StorageRef(uri, size=size, type="application/json").to_json())}
        except PipefleetError as error:
            return error if error.retryable else JobFailure(error.code, str(error), "write")
        except BaseException as error:  # a Rust panic is none of Exception
            log.exception("the result of job %s cannot be stored", message.id)
            return JobFailure("internal_error", brief(error), "write")

    def _state(self, ending: dict[str, Any] | JobFailure, answer: object) -> str | Exception:
        """The state of a job whose record was written, or why it was not."""
        try:
            with broker.redis_errors(self._settings.redis_url):
                if isinstance(answer, Exception):
                    raise answer
        except ServiceUnavailableError as error:
            return error
        return str(_state_of(ending))

    def fail(self, message: JobMessage, failure: JobFailure) -> None:
        """End a single job that never came into the engine. Nothing for an id without a UTF-8 form: nobody waits for that."""
        if utf8(message.id) != message.id:
            return
        fields = {"error": encode_json(utf8(failure.to_json())), "timings": "{}"}
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
            message.id, state, time.time(), ttl=self._settings.result_ttl, reply=message.reply, fields=fields
        )
        commands.eval(FINISH, 1, broker.job_key(message.id), *arguments)

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


_Ending = dict[str, Any] | JobFailure | Exception
"""How a job ends: what its record says of its result, its failure, or why it has no state yet."""
_FAILED_STATES = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}


def _side_by_side(do: Callable[[int], _Ending], places: Sequence[int]) -> dict[int, _Ending]:
    """What `do`, which raises nothing, gives for each place. In threads that are daemons: a worker that must end waits for none."""
    found: dict[int, _Ending] = {}
    waiting: SimpleQueue[int] = SimpleQueue()
    for place in places:
        waiting.put(place)

    def work() -> None:
        with suppress(Empty):
            while True:
                place = waiting.get_nowait()
                found[place] = do(place)

    threads = [threading.Thread(target=work, daemon=True) for _ in places[:STORED_AT_ONCE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _inline(body: bytes | JobFailure) -> _Ending:
    return body if isinstance(body, JobFailure) else {"output": body}


def _state_of(ending: dict[str, Any] | JobFailure) -> JobState:
    if isinstance(ending, JobFailure):
        return _FAILED_STATES.get(ending.code, JobState.FAILED)
    return JobState.SUCCEEDED


def _record(ending: dict[str, Any] | JobFailure, outcome: Outcome) -> tuple[JobState, dict[str, Any]]:
    """The final state of a job, and what its record says beside it."""
    said = {"error": encode_json(utf8(ending.to_json()))} if isinstance(ending, JobFailure) else ending
    timings = encode_json({stage: round(value, 6) for stage, value in outcome.work.seconds.items()})
    return _state_of(ending), {**said, "timings": timings}
