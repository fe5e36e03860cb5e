"""A good message of each kind, and ways to spoil one: the parts that `families` puts together.

A message is made as Celery's Redis transport keeps it. Names that only a run of the fuzzer knows stand in it as marks (`ID`, `TAG`,
`HOST`, `VICTIM`, `MODEL`), so that a message can be drawn before there is a worker, and printed afterwards.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pipefleet.contract.messages import TASK_NAME, JobItem, JobMessage, Priority
from pipefleet.queues.celery import SHARD_HEADER, TIME_HEADER, celery_message

TASK = "text-classification"
QUEUE = f"pipefleet.{TASK}"
ID, TAG = "@fuzz-id@", "@fuzz-tag@"
"""Stand for an id and a delivery tag that no other message has."""
QUEUED_AT = 1_767_225_600.0
HOST, VICTIM = "@fuzz-host-run@", "@fuzz-victim-run@"
"""Stand for the ids of two real runs: the shards of the first are the fuzzer's own, the second has ended and is another's."""
MODEL = "@fuzz-model@"
"""Stands for the model of these runs."""
BASE = "s3://pipefleet/fuzz/"
HOST_URI, VICTIM_URI, OUTPUTS, SHARD_FILES = f"{BASE}host/", f"{BASE}victim/", f"{BASE}outputs/", f"{BASE}shards/"
FORBIDDEN = "s3://pipefleet/forbidden/"
"""Lies under no prefix that the worker may use."""
HOST_SHARDS, HOST_ITEMS = 16, 8
ODD_ITEMS: list[tuple[str, Any]] = [
    ("\x1b[2J", "x"), ("\ud800", "y"), ("a\nb", {"$ref": f"{FORBIDDEN}secret"}), ("", None),
    ("x" * 3000, {"$ref": "file:///etc/passwd"}), ("c", {"text": "\ud800"}), ("d", [[]]), ("e", "good"),
]  # fmt: skip
GARBAGE: dict[str, bytes] = {
    "empty": b"",
    "binary": bytes(range(256)) * 8,
    "not-json": b"{\n" * HOST_ITEMS,
    "scalars": b"null\n1\n[]\n{}\n\"x\"\ntrue\n1e999\n{}\n",
    "too-few": b'{"position":0,"id":"a","inputs":"x"}\n',
    "deep": b"\n".join([b"[" * 5000 + b"]" * 5000] * HOST_ITEMS),
    "wrong-fields": b'{"position":"x","id":7,"inputs":null,"parameters":3}\n' * HOST_ITEMS,
    "odd-items": "\n".join(
        json.dumps({"position": place, "id": name, "inputs": inputs})
        for place, (name, inputs) in enumerate(ODD_ITEMS)
    ).encode(),
}  # fmt: skip
"""Files that shards are read from, under SHARD_FILES."""


def payload(**fields: Any) -> dict[str, Any]:
    """A good single job; `fields` take the place of its own, and None takes one away."""
    job: dict[str, Any] = JobMessage(ID, TASK, items=(JobItem("0", "a text"),)).to_json()
    return {name: value for name, value in {**job, **fields}.items() if value is not None}


def shard_payload(index: int = 0, **fields: Any) -> dict[str, Any]:
    """A good shard of the host's run; `fields` as in `payload`, those of the shard itself with `shard__` before them."""
    shard: dict[str, Any] = {
        "run_id": HOST, "run_uri": HOST_URI, "uri": f"{HOST_URI}_run/shards/{index:05d}.jsonl",
        "index": index, "first": index * HOST_ITEMS, "count": HOST_ITEMS,
    }  # fmt: skip
    shard.update({name.removeprefix("shard__"): value for name, value in fields.items() if name.startswith("shard__")})
    others = {"model": MODEL, **{name: value for name, value in fields.items() if not name.startswith("shard__")}}
    return payload(items=None, id=f"{HOST}-{index:05d}", shard=shard, cost=float(HOST_ITEMS), **others)


def envelope(job: Any = None, *, priority: int = int(Priority.NORMAL)) -> dict[str, Any]:
    """A good message with `job` as its payload (default: a good single job)."""
    job = payload() if job is None else job
    template = json.loads(celery_message(JobMessage(ID, TASK, items=(JobItem("0", ""),)), QUEUE, Priority.NORMAL))
    template["body"] = body_of(job)
    template["properties"].update(priority=priority, delivery_tag=TAG)
    template["headers"].update({TIME_HEADER: QUEUED_AT, "origin": "fuzz"})
    if isinstance(job, Mapping) and "shard" in job:
        template["headers"][SHARD_HEADER] = True
    if isinstance(job, Mapping) and isinstance(job.get("id"), str):
        template["headers"].update(id=job["id"], root_id=job["id"])
    return dict(template)


def body_of(job: Any) -> str:
    """The text of a body whose only argument is `job`."""
    return json.dumps([[job], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])


def spoiled(message: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `message` with another value at `path`."""
    copied: Any = copy.deepcopy(dict(message))
    place = copied
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return dict(copied)


def without(message: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """A copy of `message` without what lies at `path`."""
    copied = spoiled(message, path, None)
    place: Any = copied
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return copied


def written(message: Any, *, escaped: bool = True) -> bytes:
    """A message as bytes. Not `escaped`, lone surrogates are bytes that are no UTF-8, and control characters stay escaped."""
    return json.dumps(message, ensure_ascii=escaped, separators=(",", ":")).encode("utf-8", "surrogatepass")


def in_seconds(seconds: float) -> str:
    """Stands for a time, so many seconds after the message is pushed."""
    return f"@fuzz-in:{seconds}@"


def filled(raw: bytes, names: Mapping[str, str]) -> bytes:
    """`raw` with a name in the place of each mark, and with times in the place of those of `in_seconds`."""
    for mark, name in names.items():
        raw = raw.replace(mark.encode(), name.encode())
    return _IN.sub(lambda found: (datetime.now(UTC) + timedelta(seconds=float(found[1]))).isoformat().encode(), raw)


_IN = re.compile(rb"@fuzz-in:(-?[0-9.]+)@")


OTHER_TASKS = (
    "celery.accumulate", "celery.backend_cleanup", "celery.chain", "celery.chord", "celery.chord_unlock", "celery.chunks",
    "celery.group", "celery.map", "celery.ping", "celery.starmap", "no.such.task", "", f"{TASK_NAME} ", TASK_NAME.upper(),
    "__main__", "os.system",
)  # fmt: skip
