"""The messages between producers and workers: `JobMessage`, its JSON form, and the states of a job. No I/O.

A message is one Celery task `pipefleet.infer`; this JSON object is its only argument. It carries either `items` (a single job)
or `shard` (a slice of a bulk run, whose items lie in object storage), never both. `client` and `shards` make messages;
workers decode them. Decoding raises ContractError for a wrong message and for an unknown version. Every version has a golden
file in tests/contract/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from pipefleet.errors import ContractError
from pipefleet.printable import printable

CONTRACT_VERSION = 1
TASK_NAME = "pipefleet.infer"
MAX_MESSAGE_BYTES = 64 * 1024
MAX_WIRE_BYTES = 5 * MAX_MESSAGE_BYTES
"""Most bytes of a message as it lies in Redis. A larger message goes to the dead letters without reaching a worker. A body of
MAX_MESSAGE_BYTES becomes 130 KB with our client, and 254 KB with Celery's, which escapes each letter that is not ASCII and
writes base64. The rest is for headers."""
MAX_SHARD_ITEMS = 10_000
"""Most items of a shard: a worker holds all rows of a shard in memory until the part is written."""
MAX_SHARD_BYTES = 128 << 20
"""Most bytes of the object that lists the items of a shard."""
MAX_RUN_ITEMS = 1 << 28
"""Most items of a run. Redis allocates a bitmap up to its highest bit: 32 MiB for this many items."""
MAX_COST = 1e12
"""Highest cost of a job. Sums over the longest queue stay exact enough, and far from infinity."""
MAX_DEADLINE = 4_102_444_800.0
"""Latest deadline of a job, 1 January 2100. A thread can still wait for as many seconds."""
MAX_NAME = 1024
"""Most characters of a task, a model or a revision."""
MAX_URI = 1100
"""Most characters of a URI: the scheme, the longest bucket name and the longest key."""
REPLY_FORM = re.compile(r"pipefleet:done:[0-9a-f]{32}")
"""The channels on which a worker may publish the end of a job. Another channel could be one on which workers take orders."""
ID_FORM = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,200}")
"""Ids of jobs: 1 to 200 characters with a UTF-8 form, without control characters and line breaks."""
RUN_ID_FORM = re.compile(r"[0-9A-Za-z._-]{1,100}")
"""Ids of runs. They have no colon: with one, the id of a run could name the Redis keys of another run."""
_NOT_IN_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MOST_NAMED = 5
"""Unknown fields that a refusal names at most."""


def is_id(value: object) -> bool:
    """Whether a value is the id of a job, as a message and Celery's headers may name it."""
    return isinstance(value, str) and ID_FORM.fullmatch(value) is not None


def is_name(value: object) -> bool:
    """Whether a value is a model or a revision that a message may name."""
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and not _NOT_IN_ID.search(value)


def is_reply(value: object) -> bool:
    """Whether a worker may publish the end of a job on the channel `value`."""
    return isinstance(value, str) and REPLY_FORM.fullmatch(value) is not None


def as_id(text: str, *, most: int = 200) -> str:
    """`text` with a question mark for each character that no id holds, cut to `most` characters."""
    return _NOT_IN_ID.sub("?", text[:most])


class JobState(StrEnum):
    """The states of a job. The last four are final; a job reaches exactly one of them."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """True when nothing will change any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Priority(IntEnum):
    """Celery's number for each priority. On Redis 0 is served first; bulk runs go out as LOW."""

    HIGH = 0
    NORMAL = 3
    LOW = 9

    @classmethod
    def named(cls, name: str) -> Priority:
        """`"high"`, `"normal"` or `"low"`. Raises ContractError for another word."""
        try:
            return cls[str(name).upper()]
        except KeyError:
            raise ContractError(f"priority must be high, normal or low, not {str(name)[:40]!r}") from None


@dataclass(frozen=True, slots=True)
class JobItem:
    """One input of a job: JSON with storage references, and the parameters of this item alone."""

    id: str
    inputs: Any
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The wire form; empty parameters are left out."""
        extra = {"parameters": dict(self.parameters)} if self.parameters else {}
        return {"id": self.id, "inputs": self.inputs, **extra}

    @classmethod
    def from_json(cls, value: Any) -> JobItem:
        """The reverse of `to_json`. Raises ContractError for anything else."""
        if isinstance(value, dict) and len(value) == 2 and isinstance(value.get("id"), str) and "inputs" in value:
            return cls(value["id"], value["inputs"])  # the quick way of most items
        fields = _object(value, "an item", required={"id", "inputs"}, optional={"parameters"})
        parameters = fields.get("parameters", {})
        if not isinstance(fields["id"], str) or not isinstance(parameters, Mapping):
            raise ContractError("an item needs a text as id and an object as parameters")
        return cls(fields["id"], fields["inputs"], parameters)


@dataclass(frozen=True, slots=True)
class Shard:
    """A slice of a bulk run: `count` items from position `first`, listed at `uri`; `run_uri` is the run's output.

    A run has at most MAX_RUN_ITEMS. Workers refuse a shard of more than MAX_SHARD_ITEMS, and a shard that does not belong to the
    run that it names (see `pipefleet.contract.uris.shard_fault`). `format` is the format of its part; the wire form leaves
    `jsonl` out.
    """

    run_id: str
    run_uri: str
    uri: str
    index: int
    first: int
    count: int
    format: str = "jsonl"

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        body = {name: getattr(self, name) for name in ("run_id", "run_uri", "uri", "index", "first", "count")}
        return body if self.format == "jsonl" else {**body, "format": self.format}

    @classmethod
    def from_json(cls, value: Any) -> Shard:
        """The reverse of `to_json`. Raises ContractError for anything else; `count` is not bounded here."""
        names = {"run_id", "run_uri", "uri", "index", "first", "count"}
        fields = _object(value, "a shard", required=names, optional={"format"})
        texts = all(isinstance(fields.get(name, ""), str) for name in ("run_id", "run_uri", "uri", "format"))
        counts = all(type(fields[name]) is int and fields[name] >= 0 for name in ("index", "first", "count"))
        if not texts or not counts:
            raise ContractError("a shard needs texts as run_id, run_uri, uri and format, whole numbers elsewhere")
        shard = cls(**fields)
        shard._check_bounds()
        return shard

    def _check_bounds(self) -> None:
        if RUN_ID_FORM.fullmatch(self.run_id) is None:
            raise ContractError("run_id must have 1 to 100 of a-z, A-Z, 0-9, '.', '_' and '-'")
        for name in ("run_uri", "uri", "format"):
            _check_text(name, getattr(self, name), MAX_NAME if name == "format" else MAX_URI)
        if max(self.index, self.first) > MAX_RUN_ITEMS:
            raise ContractError(f"a shard lies within the {MAX_RUN_ITEMS} items that a run has at most")


@dataclass(frozen=True, slots=True)
class JobMessage:
    """One job as it travels. `cost` is roughly in the task's own unit, and at most MAX_COST.

    `deadline` is in seconds since 1970 (UTC) by the clock of the Redis server (`TIME`), and at most MAX_DEADLINE. Any other
    Celery client has to ask the server for that time too, because its own clock may be wrong.
    """

    id: str
    task: str
    model: str | None = None
    revision: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    items: tuple[JobItem, ...] = ()
    shard: Shard | None = None
    output: str | None = None
    deadline: float | None = None
    cost: float = 0.0
    reply: str | None = None
    """The Redis channel on which the client hears that the job has ended, of the form REPLY_FORM."""
    stream: bool = False
    """Whether the worker tells the text of the job while it writes it (see `queues.keys.text_key`)."""

    @property
    def work(self) -> float:
        """The cost that the message states; the number of its items where it states none."""
        return self.cost or float(self.shard.count if self.shard else len(self.items))

    def to_json(self) -> dict[str, Any]:
        """The wire form; empty fields are left out."""
        body: dict[str, Any] = {"version": CONTRACT_VERSION, "id": self.id, "task": self.task}
        for name in ("model", "revision", "output", "deadline", "reply"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        if self.parameters:
            body["parameters"] = dict(self.parameters)
        if self.cost:
            body["cost"] = self.cost
        if self.stream:
            body["stream"] = True
        if self.shard is not None:
            body["shard"] = self.shard.to_json()
        else:
            body["items"] = [item.to_json() for item in self.items]
        return body


_OPTIONAL = {"model", "revision", "parameters", "items", "shard", "output", "deadline", "cost", "reply", "stream"}


def decode_message(value: Any) -> JobMessage:
    """A JobMessage from its JSON form. Raises ContractError, which names the fault and never repeats the content."""
    version = value.get("version") if isinstance(value, Mapping) else None
    if type(version) is not int or version != CONTRACT_VERSION:  # True and 1.0 are equal to 1
        raise ContractError(
            f"this worker understands contract version {CONTRACT_VERSION}, the message is of version "
            f"{_version(version)}; run producers and workers of the same release"
        )
    fields = _object(value, "a message", required={"version", "id", "task"}, optional=_OPTIONAL)
    _check_scalars(fields)
    items, shard = fields.get("items"), fields.get("shard")
    if (items is None) == (shard is None):
        raise ContractError("a message carries either items or a shard")
    if items is not None and (not isinstance(items, list) or not items):
        raise ContractError("items must be a list that is not empty")
    read = None if shard is None else Shard.from_json(shard)
    if read is not None and read.first + read.count > MAX_RUN_ITEMS:
        raise ContractError(f"a shard ends within the {MAX_RUN_ITEMS} items that a run has at most")
    return JobMessage(
        id=fields["id"],
        task=fields["task"],
        model=fields.get("model"),
        revision=fields.get("revision"),
        parameters=fields.get("parameters", {}),
        items=tuple(JobItem.from_json(item) for item in items or ()),
        shard=read,
        output=fields.get("output"),
        deadline=fields.get("deadline"),
        cost=float(fields.get("cost", 0.0)),
        reply=fields.get("reply"),
        stream=fields.get("stream", False),
    )


_LENGTHS = {"id": 200, "task": MAX_NAME, "model": MAX_NAME, "revision": MAX_NAME, "output": MAX_URI, "reply": 200}
_HIGHEST = {"deadline": MAX_DEADLINE, "cost": MAX_COST}


def _check_scalars(fields: Mapping[str, Any]) -> None:
    for name, most in _LENGTHS.items():
        if name in fields:
            if not isinstance(fields[name], str):
                raise ContractError(f"{name} must be a text")
            _check_text(name, fields[name], most)
    for name in ("id", "task", "model", "revision"):
        if _NOT_IN_ID.search(fields.get(name, "")):
            raise ContractError(f"{name} must have no control characters and no line breaks")
    if not fields["id"]:
        raise ContractError("id must have 1 to 200 characters")
    if "reply" in fields and not is_reply(fields["reply"]):
        raise ContractError("reply must be a channel pipefleet:done: with 32 of 0-9 and a-f")
    for name, highest in _HIGHEST.items():
        value = fields.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
            raise ContractError(f"{name} must be a number, finite and not below 0, at most {highest:.0f}")
    if not isinstance(fields.get("parameters", {}), Mapping):
        raise ContractError("parameters must be an object")
    if not isinstance(fields.get("stream", False), bool):
        raise ContractError("stream must be true or false")


def _check_text(name: str, text: str, most: int) -> None:
    if not _has_utf8(text):  # Redis could hold neither this record nor others of the same round trip
        raise ContractError(f"{name} must have a UTF-8 form")
    if len(text) > most:
        raise ContractError(f"{name} must have {'1 to ' if name == 'id' else 'at most '}{most} characters")


def _version(value: object) -> str:
    """A version for a sentence. A value that may be long or nested is named by its type alone."""
    if type(value) is int and abs(value) >= 10**20:  # Python refuses to write the longest
        return "20 digits and more"
    return printable(str(value), 20) if value is None or isinstance(value, str | int | float) else type(value).__name__


def _has_utf8(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _object(value: Any, what: str, *, required: set[str], optional: set[str] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    if not isinstance(value, Mapping):
        raise ContractError(f"{what} must be a JSON object")
    missing, unknown = required - set(value), set(value) - required - optional
    if missing:
        raise ContractError(f"{what} lacks {', '.join(sorted(missing))}")
    if unknown:
        raise ContractError(f"{what} has unknown fields: {_named(unknown)}")
    return dict(value)


def _named(fields: Collection[object]) -> str:
    """Names of fields for a sentence. The sentence has a bounded length and a UTF-8 form for any names."""
    shown = sorted(printable(str(name), 40) for name in fields)
    return ", ".join(shown[:_MOST_NAMED]) + (
        f" and {len(shown) - _MOST_NAMED} more" if len(shown) > _MOST_NAMED else ""
    )


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode_json(value: Any) -> str:
    """Compact, strict JSON that has a UTF-8 form. Raises ContractError for NaN, infinity, lone surrogates, other types."""
    try:
        text = _ENCODER.encode(value)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"not JSON: {error}") from None
