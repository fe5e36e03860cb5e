"""The record of a single job in Redis: one hash, changed only by the scripts here, so that a final state stays final.

Fields: state, task, queue, submitted, started, finished (seconds since 1970), worker, output (JSON text), output_ref (JSON of a
StorageRef to that text), error (JSON of a JobFailure), timings (JSON: seconds by stage), warnings (JSON: a list of sentences, where
there are some), loaded (JSON: what the model ran with). Times are of the Redis server: where a script is given an empty text as a
time, it writes the server's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipefleet.contract.messages import JobState, encode_json, is_reply
from pipefleet.contract.references import StorageRef
from pipefleet.errors import ContractError
from pipefleet.foreign import number, read_object

MOST_WARNINGS = 10
"""Sentences that go with one result at most, of 300 characters each as workers write them."""

_TIME = """
local function time(given)
  if given ~= '' then return given end
  local now = redis.call('TIME')
  return now[1] .. '.' .. string.format('%06d', now[2])
end
"""

NEEDS_NO_MEMORY = "redis.call('EXPIRE', KEYS[1], 86400)"
"""The first write of a script that a server at `maxmemory` is to run: it takes no memory, and the script's last write sets its own.

Such a server refuses a script whose first write may take memory, and lets one that has begun go on. So a worker ends the jobs that
are there, each of which frees more than its end takes. (Redis 6.2 knows no `allow-oom`.)
"""

SUBMIT = f"""{_TIME}
if KEYS[3] then
  local known = redis.call('GET', KEYS[3])
  if known then
    local id, digest = string.match(known, '^(%S+) (%S+)$')
    if not id then return {{known, 1}} end
    return {{id, digest == ARGV[4] and 1 or 0}}
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then return {{ARGV[2], 1}} end
redis.call('LPUSH', KEYS[2], ARGV[3])
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'submitted', time(''))
redis.call('EXPIRE', KEYS[1], ARGV[1])
if KEYS[3] then redis.call('SET', KEYS[3], ARGV[2] .. ' ' .. ARGV[4], 'EX', ARGV[1]) end
return {{ARGV[2], 1}}
"""
"""KEYS: job, list of the queue, idempotency key or none. ARGV: ttl, id, message, digest of the request, then fields and values.
The id of the job that is queued now, or was before, and 0 when that was for another request: a command that is sent again queues
nothing twice and sets nothing back. A key without a digest, of an earlier release, stands for any request."""

START = f"""{_TIME}
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'queued' and state ~= 'running' then return 0 end
{NEEDS_NO_MEMORY}
redis.call('HSET', KEYS[1], 'state', 'running', 'started', time(ARGV[1]), 'worker', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""
"""KEYS: job. ARGV: time, worker, ttl. 0 when the job has ended already (cancelled, or finished elsewhere)."""

_FINISH = f"""{_TIME}
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'queued' and state ~= 'running' then return 0 end
-- the first write
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'finished', time(ARGV[4]))
redis.call('EXPIRE', KEYS[1], ARGV[1])
if ARGV[2] ~= '' then redis.call('PUBLISH', ARGV[2], ARGV[3]) end
return 1
"""
FINISH = _FINISH.replace("-- the first write", NEEDS_NO_MEMORY)
"""KEYS: job. ARGV: ttl, reply channel or '', id, time, then fields and values. 0 when another final state was there first."""

FINISH_WITH_ROOM = _FINISH
"""As FINISH, for fields that are large: a server at `maxmemory` refuses it, and nothing is written."""

CANCEL = f"if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end\n{FINISH}"
"""As FINISH, but it makes no record of a job nothing is known of. Its first write takes no memory, and is a producer's right."""


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job or an item failed: a stable `code`, a sentence, and the stage of the worker it happened in."""

    code: str
    message: str
    stage: str

    def to_json(self) -> dict[str, str]:
        """The wire form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job's record as it was read. Times in seconds since 1970."""

    state: JobState
    submitted: float | None = None
    started: float | None = None
    finished: float | None = None
    worker: str | None = None
    queue: str | None = None
    output: str | None = None
    output_ref: StorageRef | None = None
    failure: JobFailure | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    loaded: Mapping[str, str] = field(default_factory=dict)
    """What the model ran with: `dtype`, `device`, and where they are known `attention` and `quantization`."""


def read_record(raw: Mapping[bytes, bytes]) -> JobRecord | None:
    """The record in a hash as redis-py returns it; None when there is no such job (any more).

    Raises ContractError for a record that no version known here wrote.
    """
    if b"state" not in raw:
        return None
    try:
        return _read({name.decode(): value.decode() for name, value in raw.items()})
    except (ValueError, TypeError, LookupError, RecursionError, ContractError):
        raise ContractError(
            "the record of this job cannot be read: run producers and workers of the same release"
        ) from None


def _read(fields: Mapping[str, str]) -> JobRecord:
    reference, failure = fields.get("output_ref"), fields.get("error")
    return JobRecord(
        state=JobState(fields["state"]),
        submitted=_seconds(fields, "submitted"),
        started=_seconds(fields, "started"),
        finished=_seconds(fields, "finished"),
        worker=fields.get("worker"),
        queue=fields.get("queue"),
        output=fields.get("output"),
        output_ref=StorageRef.from_json(read_object(reference)) if reference else None,
        failure=_failure(read_object(failure)) if failure else None,
        timings={stage: number(seconds) for stage, seconds in read_object(fields.get("timings", "{}")).items()},
        warnings=_sentences(fields.get("warnings", "[]")),
        loaded={name: str(one) for name, one in read_object(fields.get("loaded", "{}")).items()},
    )


def _failure(content: Mapping[str, Any]) -> JobFailure:
    if not all(isinstance(one, str) for one in content.values()):
        raise ValueError("not a text")
    return JobFailure(**content)


def _sentences(text: str) -> tuple[str, ...]:
    found = json.loads(text)
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("not a list of texts")
    return tuple(found[:MOST_WARNINGS])


def _seconds(fields: Mapping[str, str], name: str) -> float | None:
    return number(fields[name]) if name in fields else None


def finish_arguments(
    job_id: str, state: JobState, finished: float | None, *, ttl: float, reply: str | None, fields: Mapping[str, Any]
) -> list[Any]:
    """ARGV of FINISH. `finished` None: now, by the server's clock. A `reply` that is no client's channel is left out."""
    values = {"state": str(state), **fields}
    time = "" if finished is None else finished
    return [
        int(ttl),
        reply if is_reply(reply) else "",
        job_id,
        time,
        *(part for pair in values.items() for part in pair),
    ]


def request_digest(**request: Any) -> str:
    """A digest of what a call asks for, equal for equal JSON, however the fields of its objects are ordered.

    Raises ContractError for what is not JSON.
    """
    plain = json.loads(encode_json(request))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


CANCEL_RUN = f"""
{NEEDS_NO_MEMORY}
redis.call('HSET', KEYS[1], 'cancelled', 1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""
"""KEYS: run. ARGV: ttl. Also where Redis is full: what is cancelled makes room."""
