"""Shards: their bounds, their lines in object storage, and the message that queues one. No network.

A line is `{"position": …, "id": …, "inputs": …, "parameters"?: …, "failure"?: {code, message, stage}}`. An item with a `failure`
could not be prepared: a worker writes the failure into the item's row and runs the other items. The planner writes lines and
messages; workers and `backlog` read lines. A wrong line raises ContractError or ValueError.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import MAX_SHARD_ITEMS, JobItem, JobMessage, Shard, encode_json
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ContractError

SMALLEST_SHARD = 16
LARGEST_SHARD = 512
SHARDS_OF_A_SIZE = 8
MEDIA_BYTES = 64 << 20
TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """Bounds of one shard: number of items, bytes of their inputs."""

    items: int
    size: int


@functools.lru_cache
def shard_limits(index: int, shard_size: int | None, *, media: bool) -> ShardLimits:
    """The bounds of shard `index`.

    Sizes double every 8 shards, from 16 to 512. So a small run spreads over many workers and shows results at once, and a large
    run has few messages and parts. `shard_size` fixes the count instead, up to MAX_SHARD_ITEMS.
    """
    grown = min(LARGEST_SHARD, SMALLEST_SHARD << min(index // SHARDS_OF_A_SIZE, 10))
    return ShardLimits(min(shard_size or grown, MAX_SHARD_ITEMS), MEDIA_BYTES if media else TEXT_BYTES)


def shard_id(run_id: str, index: int) -> str:
    """The job id of a shard. It does not depend on who queues the shard, so duplicates can be told."""
    return f"{run_id}-{index:05d}"


def shard_index(run_id: str, job_id: str) -> int | None:
    """The reverse of `shard_id`; None for any other job."""
    prefix, _, number = job_id.rpartition("-")
    return int(number) if prefix == run_id and number.isdecimal() else None


def shard_message(plan: RunPlan, layout: RunLayout, index: int, first: int, count: int) -> JobMessage:
    """The message for one shard of a run."""
    shard = Shard(plan.id, layout.uri, layout.shard(index), index, first, count, plan.format)
    return JobMessage(
        id=shard_id(plan.id, index),
        task=plan.task,
        model=plan.model,
        revision=plan.revision,
        parameters=plan.parameters,
        shard=shard,
        cost=float(count),
    )


def encode_shard_line(
    position: int, item: JobItem, failure: JobFailure | None = None, *, written: str | None = None
) -> str:
    """One line of a shard. `position` comes first, so that the first bytes of the object tell its first position.

    `written` is the JSON of the item's inputs, if it is known already.
    """
    written = encode_json(item.inputs) if written is None else written
    parameters = f',"parameters":{encode_json(dict(item.parameters))}' if item.parameters else ""
    failed = "" if failure is None else f',"failure":{encode_json(failure.to_json())}'
    return f'{{"position":{position},"id":{encode_json(item.id)},"inputs":{written}{parameters}{failed}}}'


def decode_shard_line(
    line: bytes, loads: Callable[[bytes], Any] = json.loads
) -> tuple[int, JobItem, JobFailure | None]:
    """The position in the run, the item, and the failure to prepare it (None for most items), of one line of a shard.

    Raises ContractError or ValueError for any other line.
    """
    fields = loads(line)
    failure = fields.pop("failure", None)
    return int(fields.pop("position")), JobItem.from_json(fields), None if failure is None else _failure(failure)


def _failure(value: Any) -> JobFailure:
    names = {"code", "message", "stage"}
    if not isinstance(value, dict) or set(value) != names or not all(isinstance(one, str) for one in value.values()):
        raise ContractError("the failure of an item has the texts code, message and stage")
    return JobFailure(**value)
