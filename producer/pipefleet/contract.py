"""The message contract between producers and workers: `JobMessage`, its JSON form, and the states a job can be in. No I/O.

One message is one Celery task `pipefleet.infer` with this JSON object as its only argument. It carries either `items`
(a single submission) or `shard` (a slice of a bulk run whose items lie in object storage), never both. A version this code
does not know is refused; every version has a golden file in tests/contract/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

from pipefleet.errors import ContractError

CONTRACT_VERSION = 1
TASK_NAME = "pipefleet.infer"
MAX_MESSAGE_BYTES = 64 * 1024
MAX_WIRE_BYTES = 5 * MAX_MESSAGE_BYTES
"""Most bytes of a message as it lies in Redis; a larger one goes to the dead letters without reaching a worker. A body of
MAX_MESSAGE_BYTES becomes 130 KB when it is quoted once more, and 254 KB where Celery escapes each letter that is not ASCII and
writes base64; the rest is for headers."""
MAX_SHARD_ITEMS = 10_000
"""Most items of a shard: a worker holds the rows of one in memory until its part is written."""


class JobState(StrEnum):
    """Where a job is; the last four are final and a job reaches exactly one of them."""

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
            return cls[name.upper()]
        except KeyError:
            raise ContractError(f"priority must be high, normal or low, not {name[:40]!r}") from None


@dataclass(frozen=True, slots=True)
class JobItem:
    """One input of a job, as JSON with storage references, and the parameters that hold for it alone."""

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
        fields = _object(value, "an item", required={"id", "inputs"}, optional={"parameters"})
        parameters = fields.get("parameters", {})
        if not isinstance(fields["id"], str) or not isinstance(parameters, Mapping):
            raise ContractError("an item needs a text as id and an object as parameters")
        return cls(fields["id"], fields["inputs"], parameters)


@dataclass(frozen=True, slots=True)
class Shard:
    """A slice of a bulk run: `count` items from position `first`, listed at `uri`; `run_uri` is the run's output.

    Workers refuse one of more than MAX_SHARD_ITEMS.
    `format` is that of its part; on the wire it is left out where it is JSON lines.
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
        """The reverse of `to_json`. Raises ContractError for anything else."""
        names = {"run_id", "run_uri", "uri", "index", "first", "count"}
        fields = _object(value, "a shard", required=names, optional={"format"})
        texts = all(isinstance(fields.get(name, ""), str) for name in ("run_id", "run_uri", "uri", "format"))
        counts = all(type(fields[name]) is int and fields[name] >= 0 for name in ("index", "first", "count"))
        if not texts or not counts:
            raise ContractError("a shard needs texts as run_id, run_uri, uri and format, whole numbers elsewhere")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class JobMessage:
    """One job as it travels. `cost` is in the task's own unit, roughly.

    `deadline` is in seconds since 1970 (UTC) by the clock of the Redis server (`TIME`), whoever sets it: a Celery client of another
    kind whose clock may be wrong asks the server too.
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
    """Redis channel on which the client waits to hear that the job has ended."""

    @property
    def work(self) -> float:
        """What the job costs as far as it says; else the number of its items."""
        return self.cost or float(self.shard.count if self.shard else len(self.items))

    def to_json(self) -> dict[str, Any]:
        """The wire form; fields that say nothing are left out."""
        body: dict[str, Any] = {"version": CONTRACT_VERSION, "id": self.id, "task": self.task}
        for name in ("model", "revision", "output", "deadline", "reply"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        if self.parameters:
            body["parameters"] = dict(self.parameters)
        if self.cost:
            body["cost"] = self.cost
        if self.shard is not None:
            body["shard"] = self.shard.to_json()
        else:
            body["items"] = [item.to_json() for item in self.items]
        return body


_OPTIONAL = {"model", "revision", "parameters", "items", "shard", "output", "deadline", "cost", "reply"}


def decode_message(value: Any) -> JobMessage:
    """A JobMessage from its JSON form. Raises ContractError that says what is wrong, never echoing the content."""
    version = value.get("version") if isinstance(value, Mapping) else None
    if type(version) is not int or version != CONTRACT_VERSION:  # True and 1.0 are equal to 1
        raise ContractError(
            f"this worker understands contract version {CONTRACT_VERSION}, the message is of version "
            f"{str(version)[:20]}; run producers and workers of the same release"
        )
    fields = _object(value, "a message", required={"version", "id", "task"}, optional=_OPTIONAL)
    _check_scalars(fields)
    items, shard = fields.get("items"), fields.get("shard")
    if (items is None) == (shard is None):
        raise ContractError("a message carries either items or a shard")
    if items is not None and (not isinstance(items, list) or not items):
        raise ContractError("items must be a list that is not empty")
    return JobMessage(
        id=fields["id"],
        task=fields["task"],
        model=fields.get("model"),
        revision=fields.get("revision"),
        parameters=fields.get("parameters", {}),
        items=tuple(JobItem.from_json(item) for item in items or ()),
        shard=None if shard is None else Shard.from_json(shard),
        output=fields.get("output"),
        deadline=fields.get("deadline"),
        cost=float(fields.get("cost", 0.0)),
        reply=fields.get("reply"),
    )


def _check_scalars(fields: Mapping[str, Any]) -> None:
    for name in ("id", "task", "model", "revision", "output", "reply"):
        if name in fields and not isinstance(fields[name], str):
            raise ContractError(f"{name} must be a text")
        if not _has_utf8(
            fields.get(name, "")
        ):  # Redis could hold neither its record nor those that are written with it
            raise ContractError(f"{name} must have a UTF-8 form")
    if not 0 < len(fields["id"]) <= 200:
        raise ContractError("id must have 1 to 200 characters")
    for name in ("deadline", "cost"):
        value = fields.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise ContractError(f"{name} must be a number, finite and not below 0")
    if not isinstance(fields.get("parameters", {}), Mapping):
        raise ContractError("parameters must be an object")


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
        raise ContractError(f"{what} has unknown fields: {', '.join(sorted(str(name)[:40] for name in unknown))}")
    return dict(value)


def encode_json(value: Any) -> str:
    """Compact, strict JSON that has a UTF-8 form. Raises ContractError for NaN, infinity, lone surrogates, other types."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise ContractError(f"not JSON: {error}") from None
