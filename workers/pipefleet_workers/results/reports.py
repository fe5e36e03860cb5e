"""Writes states, progress and results to Redis, after the result itself is stored where it belongs. Acks come after this.

    result stored (S3) ─▶ record or progress (Redis) ─▶ ack of the message

`consumer`, `singles`, `shards`, `revocations` and `burials` call `Reporter`. All methods raise ServiceUnavailableError
while Redis or S3 is away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipefleet.connection.errors import redis_errors
from pipefleet.connection.scripts import ScriptBatch, run_script
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobMessage, JobState, Shard, encode_json, is_reply
from pipefleet.contract.records import (
    FINISH,
    FINISH_WITH_ROOM,
    REVOKE,
    START,
    JobFailure,
    finish_arguments,
)
from pipefleet.errors import ContractError, ServiceFullError, ServiceUnavailableError
from pipefleet.queues.dead_letters import FOREIGN, DeadLetter
from pipefleet.queues.keys import WORKERS_KEY, job_key, ledger_keys, run_key
from pipefleet.runs.letters import BURY
from pipefleet.runs.refusals import Refusals
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.ending import Ending, before, single_ending
from pipefleet_workers.items import Outcome
from pipefleet_workers.results.lines import utf8, utf8_all
from pipefleet_workers.results.records import RecordWriter, Said
from pipefleet_workers.storage.store import WorkerStore

PROGRESS = """
redis.call('EXPIRE', KEYS[1], ARGV[1])
local function mark(key, first, last, bit)
  while first <= last and (first % 8 > 0 or last - first < 7) do
    redis.call('SETBIT', key, first, bit)
    first = first + 1
  end
  local bytes = math.floor((last - first + 1) / 8)
  if bytes > 0 then redis.call('SETRANGE', key, first / 8, string.rep(string.char(255 * bit), bytes)) end
  for place = first + 8 * bytes, last do redis.call('SETBIT', key, place, bit) end
end
for group = 2, 3 do
  local ranges = cjson.decode(ARGV[group])
  for i = 1, #ranges, 2 do
    mark(KEYS[1], ranges[i], ranges[i + 1], 1)
    mark(KEYS[2], ranges[i], ranges[i + 1], group - 2)
  end
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[1]) end
"""
"""KEYS: the bitmaps items and failed. ARGV: ttl, JSON lists of succeeded and of failed positions: first, last, first, last, …
One script that writes whole bytes, since two commands for each item take far more time of this process and of Redis. The first
write takes no memory, see `records.NEEDS_NO_MEMORY`.
"""

PART = """
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('SETBIT', KEYS[1], ARGV[1], 1)
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {redis.call('BITCOUNT', KEYS[1]) + redis.call('HLEN', KEYS[2]), redis.call('HGET', KEYS[3], 'shards')}
"""
"""KEYS: parts and refused of the run, the run. ARGV: index of a shard whose part is there, ttl. If the shard was refused in another
copy of its message, this removes the refusal. Returns the number of ended shards, and the number of all shards if it is known.
"""

COUNT = """
redis.call('HDEL', KEYS[2], '')
for i = 1, #ARGV, 3 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 2]) end
end
"""
"""KEYS: owners and deliveries of a queue. ARGV: tag, owner, count, …: the count is set only if the owner still holds the lease. A
count is set, never added to, so a call whose answer was lost may be repeated. The first write takes no memory.
"""


LITTLE = 1024
"""Longest result, in bytes, that goes into a record while Redis is full; a longer result is stored as an object then."""


class Reporter:
    """Writes the records that clients read. Thread-safe. All methods raise ServiceUnavailableError when Redis or S3 is away."""

    def __init__(
        self,
        redis: Any,
        store: WorkerStore,
        settings: Settings,
        *,
        worker: str,
        on_failed: Callable[[JobFailure], None] = lambda failure: None,
        loaded: Mapping[str, str] | None = None,
    ) -> None:
        """`on_failed` is called for each job that `fail` ends. `loaded` goes into the records of jobs that have run."""
        self._redis = redis
        self._store = store
        self._results = RecordWriter(store, settings)
        self._settings = settings
        self._worker = worker
        self._on_failed = on_failed
        self._loaded = {"loaded": encode_json(dict(loaded))} if loaded else {}

    @property
    def store_uri(self) -> str:
        """The prefix of long results."""
        return self._settings.store

    def ping(self) -> None:
        """Ask Redis whether it takes writes; a replica, or a server with a full disk, does not."""
        with redis_errors(self._settings.redis_url):
            self._redis.hdel(WORKERS_KEY, "")

    def count_deliveries(self, leases: Sequence[Lease], *, excused: bool) -> None:
        """Set the delivery count of each lease; with `excused`, without this delivery.

        The counts of lost leases stay as they are.
        """
        for queue in {lease.queue for lease in leases}:
            keys = ledger_keys(queue)
            ours = [(one.tag, one.owner, one.deliveries - excused) for one in leases if one.queue == queue]
            arguments = [part for one in ours for part in one]
            with redis_errors(self._settings.redis_url):
                run_script(self._redis, COUNT, [keys["owners_key"], keys["deliveries_key"]], *arguments)

    def start_many(self, messages: Sequence[JobMessage]) -> list[JobState | Exception]:
        """Mark single jobs as running. Returns `running` for each; for a job that has ended already, its final state.

        Returns an error for a job whose record Redis refuses to change; the other jobs go on.
        """
        keys = [job_key(message.id) for message in messages]
        with redis_errors(self._settings.redis_url):
            answers = self._started(keys)
            others = self._others(messages, answers)
        return [
            self._refused(answer) if isinstance(answer, Exception) else others.get(place, JobState.RUNNING)
            for place, answer in enumerate(answers)
        ]

    def _started(self, keys: Sequence[str]) -> list[Any]:
        """The answers of START for each job: one script for all of them, or one for each if Redis refuses one of the jobs."""
        arguments = ["", self._worker, int(self._settings.result_ttl)]  # the server's time
        together, each = ScriptBatch(self._redis), ScriptBatch(self._redis)
        together.add(START, keys, *arguments)
        (answer,) = together.run()
        if not isinstance(answer, Exception):
            return list(answer)
        for key in keys:
            each.add(START, [key], *arguments)
        return [one if isinstance(one, Exception) else one[0] for one in each.run()]

    def finish_many(self, ends: Sequence[tuple[JobMessage, Outcome]]) -> list[Ending | Exception]:
        """Bring single jobs to their final states, after storing their results. Returns the ending of each, or the error.

        If a final state was there first, it stays, and the ending tells this state. While Redis is full, results are stored as
        objects.
        """
        found = self._finish_many(ends, self._results.write(ends))
        full = [place for place, one in enumerate(found) if isinstance(one, ServiceFullError)]
        if full:
            some = [ends[place] for place in full]
            again = self._finish_many(some, self._results.write(some, every=True))
            found = [dict(zip(full, again, strict=True)).get(place, one) for place, one in enumerate(found)]
        return found

    def _finish_many(
        self, ends: Sequence[tuple[JobMessage, Outcome]], told: Sequence[Said]
    ) -> list[Ending | Exception]:
        batch = ScriptBatch(self._redis)
        found: list[Ending | Exception] = []
        for (message, outcome), said in zip(ends, told, strict=True):
            if isinstance(said, Exception):
                found.append(said)
                continue
            failure = said if isinstance(said, JobFailure) else None
            state = Outcome(outcome.work, failure=failure).state
            fields = {} if isinstance(said, JobFailure) else said
            told_of = _told(failure, outcome.work.seconds, outcome.work.warnings)
            self._finish(batch, message, state, {**fields, **self._loaded, **told_of})
            found.append(single_ending(state, failure))
        written = [place for place, one in enumerate(found) if isinstance(one, Ending)]
        try:
            answers = self._ended([ends[place][0] for place in written], batch)
        except ServiceUnavailableError as error:
            return [error] * len(ends)
        for place, answer in zip(written, answers, strict=True):
            found[place] = answer or found[place]
        return found

    def end(self, message: JobMessage, state: JobState, failure: JobFailure) -> Ending:
        """End a single job that is not in the engine, and tell its client. Returns its ending: this one, or an earlier one."""
        batch = ScriptBatch(self._redis)
        self._finish(batch, message, state, _told(failure))
        (answer,) = self._ended([message], batch)
        if isinstance(answer, Exception):
            raise answer
        if is_reply(message.reply) and answer is not None:  # the process that ended it may not have known its client
            with redis_errors(self._settings.redis_url):
                self._redis.publish(message.reply, message.id)
        return answer or single_ending(state, failure)

    def fail(self, message: JobMessage, failure: JobFailure) -> None:
        """End a single job that never entered the engine as failed, unless it has ended.

        Does nothing for an id without a UTF-8 form: no client can wait for it.
        """
        if utf8(message.id) == message.id and self.end(message, JobState.FAILED, failure).here:
            self._on_failed(failure)

    def revoke(self, job_id: str, failure: JobFailure, at: float) -> None:
        """End a single job that is not in this worker as cancelled. Makes no record for an unknown job.

        A job that has ended stays as it is, and a job that started after `at`, in seconds since 1970 by the server's clock.
        """
        ttl = self._settings.result_ttl
        arguments = finish_arguments(job_id, JobState.CANCELLED, None, ttl=ttl, reply=None, fields=_told(failure))
        with redis_errors(self._settings.redis_url):
            run_script(self._redis, REVOKE, [job_key(job_id)], *arguments, at)

    def bury(self, letter: DeadLetter, failure: JobFailure, queue: str, reply: str | None) -> None:
        """End the single job of a dead letter, unless the letter was queued again or removed meanwhile."""
        assert letter.job_id is not None
        ttl, keys = self._settings.result_ttl, ledger_keys(queue)
        arguments = finish_arguments(letter.job_id, JobState.FAILED, None, ttl=ttl, reply=reply, fields=_told(failure))
        names = (job_key(letter.job_id), keys["unreported_key"], keys["dead_key"])
        with redis_errors(self._settings.redis_url):
            ended = run_script(self._redis, BURY, names, *arguments, letter.entry)
        if ended:
            self._on_failed(failure)

    def progress(self, shard: Shard, outcomes: Sequence[Outcome]) -> None:
        """Note the items of a shard that have ended, and the failed items among them, in one command."""
        if not outcomes:
            return
        keys = [run_key(shard.run_id, name) for name in ("items", "failed")]
        failed = [shard.first + one.work.position for one in outcomes if one.failure is not None]
        succeeded = [shard.first + one.work.position for one in outcomes if one.failure is None]
        arguments = [int(self._settings.run_ttl), encode_json(_ranges(succeeded)), encode_json(_ranges(failed))]
        with redis_errors(self._settings.redis_url):
            run_script(self._redis, PROGRESS, keys, *arguments)

    def part_written(self, shard: Shard) -> bool:
        """Note that a shard's part is there. True if the run is planned to its end and no other shard is left."""
        keys = [run_key(shard.run_id, name) for name in ("parts", "refused", "")]
        with redis_errors(self._settings.redis_url):
            ended, shards = run_script(self._redis, PART, keys, shard.index, int(self._settings.run_ttl))
        return shards is not None and ended >= int(shards)

    def refusals(self, objects: ObjectStore, layout: RunLayout, run_id: str) -> Refusals:
        """The `Refusals` of a run: its refused shards, and the end of the run once no shard is left."""
        return Refusals(self._redis, self._settings, objects, layout, run_id)

    def run_cancelled(self, shard: Shard) -> bool:
        """Whether the run of a shard was cancelled. If Redis does not know the run, the store is asked.

        Raises ContractError if Redis knows a run with this id elsewhere: notes under this id then belong to the other run.
        """
        key = run_key(shard.run_id)
        pipe = self._redis.pipeline(transaction=False)
        pipe.hexists(key, "cancelled")
        pipe.exists(key)
        pipe.hget(key, "uri")
        with redis_errors(self._settings.redis_url):
            cancelled, known, uri = pipe.execute()
        if uri is not None and uri != shard.run_uri.encode():
            raise ContractError(f"{FOREIGN}the run {shard.run_id} lies elsewhere")
        return bool(cancelled) or (not known and self._store.exists(RunLayout(shard.run_uri).cancelled))

    def _finish(self, batch: ScriptBatch, message: JobMessage, state: JobState, fields: dict[str, Any]) -> None:
        """Bring a job to its final state when `batch` runs."""
        arguments = finish_arguments(
            message.id, state, None, ttl=self._settings.result_ttl, reply=message.reply, fields=fields
        )
        script = FINISH_WITH_ROOM if len(fields.get("output", b"")) > LITTLE else FINISH
        batch.add(script, [job_key(message.id)], *arguments)

    def _ended(self, messages: Sequence[JobMessage], batch: ScriptBatch) -> list[Ending | Exception | None]:
        """Run the FINISH of each message. Returns None for a job that ended now, the earlier ending, or the error of Redis.

        An error for one job does not stop the others.
        """
        with redis_errors(self._settings.redis_url):
            answers = batch.run()
            others = self._others(messages, answers)
        refused = {place: self._refused(one) for place, one in enumerate(answers) if isinstance(one, Exception)}
        endings = {place: before(state) for place, state in others.items()}
        return [refused.get(place) or endings.get(place) for place in range(len(messages))]

    def _refused(self, answer: Exception) -> Exception:
        try:
            with redis_errors(self._settings.redis_url):
                raise answer
        except ServiceUnavailableError as error:
            return error

    def _others(self, messages: Sequence[JobMessage], answers: Sequence[Any]) -> dict[int, JobState]:
        """The final states of jobs that had ended before, by position: their scripts returned 0."""
        places = [place for place, answer in enumerate(answers) if not answer]
        pipe = self._redis.pipeline(transaction=False)
        for place in places:
            pipe.hget(job_key(messages[place].id), "state")
        found = pipe.execute() if places else []
        return {place: _state(raw) for place, raw in zip(places, found, strict=True)}


def _ranges(places: Sequence[int]) -> list[int]:
    """First and last place of each run of neighbours, one after another."""
    found: list[int] = []
    for place in sorted(places):
        if found and place == found[-1] + 1:
            found[-1] = place
        else:
            found += [place, place]
    return found


def _state(raw: bytes | None) -> JobState:
    """The final state in a record; failed if this release knows no such state."""
    try:
        return JobState((raw or b"failed").decode())
    except ValueError:
        return JobState.FAILED


def _told(
    failure: JobFailure | None, seconds: Mapping[str, float] | None = None, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """The fields of a record beside its result: the failure, the seconds of each stage, and the warnings, if any."""
    timings = encode_json({stage: round(value, 6) for stage, value in (seconds or {}).items()})
    error = {} if failure is None else {"error": encode_json(utf8(failure.to_json()))}
    told = {"warnings": encode_json(utf8_all(warnings))} if warnings else {}
    return {**error, **told, "timings": timings}
