"""The types between the stages: the input and output of each stage.

    Work → Fetched → Decoded → Unit(s) → Batch → Finished → Outcome

An item is one input of a job; a unit is one input of the model. Most items are one unit; a long recording is many units. Objects
that each item makes are not frozen, though nothing changes them: making a frozen object takes three times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from pipefleet.contract.messages import JobItem, JobState, Shard
from pipefleet.contract.records import JobFailure

if TYPE_CHECKING:
    import numpy as np


_NO_SECONDS: Mapping[str, float] = MappingProxyType({})


class ItemError(Exception):
    """An item cannot be served: `code` and `stage` go into its result. Never ends a batch, a shard or the worker."""

    def __init__(self, code: str, message: str, stage: str) -> None:
        super().__init__(message)
        self.failure = JobFailure(code, message, stage)


class OutgrownError(ItemError):
    """An input decodes to more than its header declared. It is decoded again when the worker's budget has room for `size` bytes."""

    def __init__(self, message: str, stage: str, size: int) -> None:
        super().__init__("too_large", message, stage)
        self.size = size


class Sink(Protocol):
    """Gets the outcomes of one job. Called by any thread."""

    def deliver(self, *outcomes: Outcome) -> None:
        """Take outcomes of items of this job."""

    def abandon(self, reason: Exception) -> None:
        """Take no more outcomes: the job goes back to its queue."""


class Nowhere:
    """The sink of a job whose outcomes nobody waits for."""

    def deliver(self, *outcomes: Outcome) -> None:
        """Do nothing."""

    def abandon(self, reason: Exception) -> None:
        """Do nothing."""


@dataclass(slots=True)
class JobContext:
    """The common data of the items of one job. `priority` counts as in Celery: 0 is served first.

    `deadline` is in seconds of this process's monotonic clock; None for no deadline.
    """

    id: str
    run_id: str | None
    parameters: Mapping[str, Any]
    priority: int
    deadline: float | None
    sink: Sink
    cancelled: bool = False
    patient: bool = True
    """Whether the job goes back when a service fails one of its items; otherwise this item fails."""
    is_away: Callable[[], bool] = lambda: False
    """Whether a service is away for every worker. The job then goes back in any case, since this try does not count as its last."""
    shard: Shard | None = None
    """The shard, if this job is part of a bulk run."""
    settle: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = lambda below, own: {**below, **own}
    """Lays the parameters of an item over the parameters of the job."""
    streams: bool = False
    """Whether the client reads the text while it is written."""
    given_back: bool = False
    """Whether the job runs again; outcomes that still come from here then count as nothing."""

    def give_back(self, reason: Exception) -> None:
        """End the job here without a result, so that it can run again; later outcomes are dropped."""
        self.sink.abandon(reason)  # abandon first: cancelling first would record the items as cancelled
        self.given_back = self.cancelled = True

    def stopped(self, stage: str) -> JobFailure | None:
        """Why no more work should go into this job, or None. Every stage asks before it begins an item."""
        if self.cancelled:
            return JobFailure("cancelled", "the job was cancelled", stage)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return JobFailure("expired", "the deadline of the job has passed", stage)
        return None


@dataclass(slots=True)
class Room:
    """The bytes that one item takes of a worker's budget."""

    inputs: int | None = None
    """Bytes of the inputs; None for an item that was not counted on its way in."""
    decoded: int = 0
    """Bytes of the decoded input and of the model's features, until the model has given its outputs."""
    outputs: int = 0
    """Bytes of the model's outputs, until the finish stage has made a result of them."""
    result: int = 0
    """Bytes of the result, until it is stored."""


@dataclass(slots=True)
class Work:
    """One admitted item. `position` counts inside its job."""

    job: JobContext
    position: int
    item: JobItem
    parameters: Mapping[str, Any]
    weight: int
    """Bytes that it counts for while it is in the worker."""
    seconds: Mapping[str, float] = field(default_factory=lambda: _NO_SECONDS)
    """The seconds that each stage took. Items that go together share one mapping, so it never changes; see `spend`."""
    fetches: bool = True
    """Whether its inputs contain references."""
    room: Room = field(default_factory=Room)
    """Its room in the worker's budget. Only the budget changes it."""
    warnings: list[str] = field(default_factory=list)
    """Sentences that go with its result, for example on damage to its recording; see `inputs.losses.note` for their bounds."""


def spend(works: Iterable[Work], stage: str, seconds: float) -> None:
    """Add `seconds` of a stage to each item."""
    known: dict[int, tuple[Mapping[str, float], Mapping[str, float]]] = {}
    for work in works:
        before = work.seconds
        if id(before) not in known:
            known[id(before)] = before, {**before, stage: before.get(stage, 0.0) + seconds}
        work.seconds = known[id(before)][1]


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of one object, in place of its reference."""

    uri: str
    content: bytes
    type: str | None


@dataclass(slots=True)
class Fetched:
    """`inputs` with a Blob in place of every reference."""

    work: Work
    inputs: Any


@dataclass(slots=True)
class Decoded:
    """`value` in the form that a pipeline's preprocess takes: text, PIL image, samples, or a dict of those."""

    work: Work
    value: Any


@dataclass(slots=True)
class Assembly:
    """Collects the outputs of the units of one item. One thread at a time calls `collect`."""

    work: Work
    expected: int
    context: Any = None
    """Data that the adapter's `prepare` keeps for its `finish`."""
    outputs: dict[int, Any] = field(default_factory=dict)
    failure: JobFailure | None = None

    def collect(self, index: int, output: Any | JobFailure) -> bool:
        """Note the output of unit `index`, or its failure. True if it was the last unit."""
        if isinstance(output, JobFailure):
            self.failure = self.failure or output
        self.outputs[index] = output
        return len(self.outputs) == self.expected


@dataclass(slots=True)
class Unit:
    """One model input.

    Units with an equal `key` may share a batch; `length` is the size that is padded to the longest of the batch.

    `fixed` is the cost of a unit beside its length; it is the same for all units of a key.
    """

    assembly: Assembly
    index: int
    key: Any
    length: int
    features: Any
    fixed: int = 0
    created: float = 0.0

    @property
    def cost(self) -> int:
        """Its cost in a batch of its own."""
        return self.length + self.fixed

    @property
    def priority(self) -> int:
        """The priority of its job."""
        return self.assembly.work.job.priority


@dataclass(frozen=True, slots=True)
class Batch:
    """Units that go through the model together."""

    key: Any
    units: Sequence[Unit]

    @property
    def cost(self) -> int:
        """Padded cost: the longest unit, with its fixed part, times the number of units."""
        return (max(unit.length for unit in self.units) + self.units[0].fixed) * len(self.units)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A part of a result that becomes an object of its own. `encode` gives its bytes, and raises the errors of its codec."""

    uri: str
    media_type: str
    encode: Callable[[], bytes]
    size: int
    """Its bytes in memory."""


@dataclass(slots=True)
class Finished:
    """A result on its way to the store. `value` refers to the `artifacts`; a stored artifact leaves the list."""

    work: Work
    value: Any
    artifacts: list[Artifact]


@dataclass(slots=True)
class Encoded:
    """A result as it is written: JSON whose artifacts are already stored; or a `vector` for a part that holds vectors."""

    body: bytes = b""
    vector: np.ndarray[Any, Any] | None = None


@dataclass(slots=True)
class Outcome:
    """The end of one item: an `output` (Encoded if the engine writes results, else a value), or a `failure`."""

    work: Work
    output: Any = None
    failure: JobFailure | None = None

    @property
    def state(self) -> JobState:
        """The state that the item has reached."""
        return JobState.SUCCEEDED if self.failure is None else _STATES.get(self.failure.code, JobState.FAILED)


_STATES = {"cancelled": JobState.CANCELLED, "expired": JobState.EXPIRED}


@dataclass(frozen=True, slots=True)
class Audio:
    """Sound in a result: float32 samples `[frames]` or `[channels, frames]` at `rate` Hz."""

    samples: np.ndarray[Any, Any]
    rate: int
