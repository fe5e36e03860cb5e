"""The record of a single job: one Redis hash. Only the scripts of this module change it, so a final state stays final.

    SUBMIT ─▶ queued ── START ─▶ running ── FINISH ─▶ succeeded, failed or expired
                 └───────────────────┴───── CANCEL ─▶ cancelled

Fields: state, task, queue, submitted, started, finished (seconds since 1970), worker, output (JSON text), output_ref (JSON of a
StorageRef to that text), error (JSON of a JobFailure), timings (JSON: seconds by stage), warnings (JSON: a list of sentences, if
there are any), loaded (JSON: dtype, device … of the model), hears (RECORD if the client takes the record with the notice of the
end). Times are the Redis server's: a script that gets an empty text as a
time writes the server's own. Clients submit and cancel; workers start and finish. `read_record` raises ContractError for a
record that no known version wrote.
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

HEARS, RECORD = "hears", "record"
"""A field of a record and its value: the client reads notices with records. A client of an earlier release writes no such field,
and gets notices of the id alone. A worker of an earlier release sends the id alone, and the client looks up the record."""
MOST_TOLD = 64 * 1024
"""Most bytes of new fields with which a record goes into its notice."""
MOST_WARNINGS = 10
"""Most sentences that go with one result. Workers write up to 300 characters for each."""

_TIME = """
local function time(given)
  if given ~= '' then return given end
  local now = redis.call('TIME')
  return now[1] .. '.' .. string.format('%06d', now[2])
end
"""

NEEDS_NO_MEMORY = "redis.call('EXPIRE', KEYS[1], 86400)"
"""The first write of each script that a full server has to run. The script's last write sets the real lifetime.

A server at `maxmemory` refuses a script whose first write may take memory. It lets a script go on that has begun with a write
that takes none, such as this one. So workers can end the jobs that are there, and each job frees more memory than its end
takes. (Redis 6.2 knows no `allow-oom`.)
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
redis.call('HSET', KEYS[1], 'submitted', time(''), unpack(ARGV, 5))
redis.call('EXPIRE', KEYS[1], ARGV[1])
if KEYS[3] then redis.call('SET', KEYS[3], ARGV[2] .. ' ' .. ARGV[4], 'EX', ARGV[1]) end
return {{ARGV[2], 1}}
"""
"""KEYS: job, list of the queue, idempotency key or none. ARGV: ttl, id, message, digest of the request, then fields and values.
Returns the id of the job that is queued now or was queued before, and 1; 0 instead of 1 when the earlier job was for another
request. So a command that is sent again queues nothing twice and sets nothing back. A key without a digest, of an earlier
release, stands for any request."""

START = f"""{_TIME}
local started, now = {{}}, time(ARGV[1])
for i, key in ipairs(KEYS) do
  local state = redis.call('HGET', key, 'state')
  started[i] = (not state or state == 'queued' or state == 'running') and 1 or 0
  if started[i] == 1 then
    redis.call('EXPIRE', key, 86400)
    redis.call('HSET', key, 'state', 'running', 'started', now, 'worker', ARGV[2])
    redis.call('EXPIRE', key, ARGV[3])
  end
end
return started
"""
"""KEYS: jobs. ARGV: time, worker, ttl. Returns for each 1, or 0 when it has ended already (cancelled, or finished elsewhere). An
error about one job, which only a foreign key gives, leaves later jobs as they were. The first write needs no memory, see
NEEDS_NO_MEMORY."""

_FINISH = f"""{_TIME}
local function notice(id, size)
  if size > {MOST_TOLD} or redis.call('HGET', KEYS[1], '{HEARS}') ~= '{RECORD}' then return id end
  return id .. '\\n' .. cjson.encode(redis.call('HGETALL', KEYS[1]))
end
local state = redis.call('HGET', KEYS[1], 'state')
if state and state ~= 'queued' and state ~= 'running' then return 0 end
-- the first write
local size = 0
for i = 6, #ARGV, 2 do size = size + #ARGV[i] end
redis.call('HSET', KEYS[1], 'finished', time(ARGV[4]), unpack(ARGV, 5))
redis.call('EXPIRE', KEYS[1], ARGV[1])
if ARGV[2] ~= '' then redis.call('PUBLISH', ARGV[2], notice(ARGV[3], size)) end
return 1
"""
FINISH = _FINISH.replace("-- the first write", NEEDS_NO_MEMORY)
"""KEYS: job. ARGV: ttl, reply channel or '', id, time, then fields and values. Returns 0 when another final state was first.

The channel gets a notice, see `read_notice`.
"""

FINISH_WITH_ROOM = _FINISH
"""As FINISH, for large fields: a server at `maxmemory` refuses this script and writes nothing."""

CANCEL = f"if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end\n{FINISH}"
"""As FINISH, but it makes no record of an unknown job. Its first write takes no memory, and producers have the right to it."""

REVOKE = f"""
local revoked, started = tonumber(table.remove(ARGV)), redis.call('HGET', KEYS[1], 'started')
if started and tonumber(started) > revoked then return 0 end
{CANCEL}"""
"""As CANCEL, with the time of the revocation as the last ARGV. A job that started later was queued anew, and stays."""


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job or an item failed: a stable `code`, a sentence, and the stage of the worker in which it failed."""

    code: str
    message: str
    stage: str

    def to_json(self) -> dict[str, str]:
        """The wire form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job's record as it was read. Times are in seconds since 1970."""

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
    """How the model was loaded: `dtype`, `device`, and where they are known `attention`, `quantization` and `linears`."""


def read_record(raw: Mapping[bytes, bytes]) -> JobRecord | None:
    """The record in a hash as redis-py returns it; None when there is no such job, or no longer.

    Raises ContractError for a record that no known version wrote.
    """
    if b"state" not in raw:
        return None
    try:
        return _read({name.decode(): value.decode() for name, value in raw.items()})
    except (ValueError, TypeError, LookupError, RecursionError, ContractError):
        raise ContractError(
            "the record of this job cannot be read: run producers and workers of the same release"
        ) from None


def read_notice(raw: bytes) -> tuple[str, JobRecord | None]:
    """The id of a job that has ended, and its record if the notice holds it: the id, a line feed, JSON of names and values in turn.

    A record that cannot be read, or is not final, counts as absent; the reader then looks it up.
    """
    name, _, text = raw.partition(b"\n")
    job_id = name.decode(errors="replace")
    if not text:
        return job_id, None
    try:
        parts = _texts(json.loads(text.decode()))
        record = _read(dict(zip(parts[::2], parts[1::2], strict=True)))
    except (ValueError, TypeError, LookupError, RecursionError, ContractError):
        return job_id, None
    return job_id, record if record.state.final else None


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
    return tuple(_texts(json.loads(text))[:MOST_WARNINGS])


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError("not a list of texts")
    return found


def _seconds(fields: Mapping[str, str], name: str) -> float | None:
    return number(fields[name]) if name in fields else None


def finish_arguments(
    job_id: str, state: JobState, finished: float | None, *, ttl: float, reply: str | None, fields: Mapping[str, Any]
) -> list[Any]:
    """The ARGV of FINISH. `finished` None is now, by the server's clock. A `reply` that is no client's channel is left out."""
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
    """A digest of a request. Equal JSON has equal digests, in any order of the fields.

    Raises ContractError for a value that is not JSON.
    """
    plain = json.loads(encode_json(request))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


CANCEL_RUN = f"""
{NEEDS_NO_MEMORY}
redis.call('HSET', KEYS[1], 'cancelled', 1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""
"""KEYS: run. ARGV: ttl. A full server runs it too, because cancelled work makes room."""
