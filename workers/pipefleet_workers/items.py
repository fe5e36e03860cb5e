"""The types between the stages: what each one takes and gives.

    Work → Fetched → Decoded → Unit(s) → Batch → Finished → Outcome

An item is one input of a job; a unit is one input of the model. Most items are one unit, a long recording is many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipefleet.contract.messages import JobItem, JobState, Shard
from pipefleet.contract.records import JobFailure

if TYPE_CHECKING:
    import numpy as np


class ItemError(Exception):
    """An item cannot be served: `code` and `stage` go into its result. Never ends a batch, a shard or the worker."""

    def __init__(self, code: str, message: str, stage: str) -> None:
        super().__init__(message)
        self.failure = JobFailure(code, message, stage)


class OutgrownError(ItemError):
    """An input decodes to more than its header declared: it is decoded again when the worker's budget has `size` bytes."""

    def __init__(self, message: str, stage: str, size: int) -> None:
        super().__init__("too_large", message, stage)
        self.size = size


class Sink(Protocol):
    """Where the outcomes of one job go. Called by any thread."""

    def deliver(self, outcome: Outcome) -> None:
        """Take one outcome."""

    def abandon(self, reason: Exception) -> None:
        """Take no more outcomes: the job goes back to its queue."""


@dataclass(slots=True)
class JobContext:
    """What the items of one job share. `priority` counts as in Celery: 0 is served first.

    `deadline` is in seconds of this process's monotonic clock; None where there is none.
    """

    id: str
    run_id: str | None
    parameters: Mapping[str, Any]
    priority: int
    deadline: float | None
    sink: Sink
    cancelled: bool = False
    patient: bool = True
    """Whether the job goes back when a service fails one of its items; otherwise that item fails."""
    is_away: Callable[[], bool] = lambda: False
    """Whether a service is away for everybody: then the job goes back in any case, since no try is its last."""
    shard: Shard | None = None
    """What a bulk run calls this job."""
    settle: Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]] = lambda below, own: {**below, **own}
    """Lays the parameters of an item over those of the job."""
    given_back: bool = False
    """Whether it runs again: then what is left of it here counts as nothing."""

    def give_back(self, reason: Exception) -> None:
        """End the job here without a result, so that it can run again: what comes in from now on is dropped."""
        self.sink.abandon(reason)  # first: an item that is dropped because of the next line must not count as ended
        self.given_back = self.cancelled = True

    def stopped(self, stage: str) -> JobFailure | None:
        """Why no more work should go into this job, or None. Asked before every stage."""
        if self.cancelled:
            return JobFailure("cancelled", "the job was cancelled", stage)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return JobFailure("expired", "the deadline of the job has passed", stage)
        return None


@dataclass(slots=True)
class Room:
    """What one item takes of a worker's budget, in bytes."""

    inputs: int | None = None
    """None for an item that was not counted on its way in."""
    decoded: int = 0
    """Of the decoded input and what the model gets of it, until the model has given its outputs."""
    outputs: int = 0
    """Of what the model gave, until the finish stage has made a result of it."""
    result: int = 0
    """Of the result, until it is stored."""


@dataclass(slots=True)
class Work:
    """One admitted item. `position` counts inside its job; `seconds` by stage grow as it passes through."""

    job: JobContext
    position: int
    item: JobItem
    parameters: Mapping[str, Any]
    weight: int
    """Bytes it is counted with while it is in the worker."""
    seconds: dict[str, float] = field(default_factory=dict)
    fetches: bool = True
    """Whether its inputs hold references."""
    room: Room = field(default_factory=Room)
    """What it takes of the worker's budget. Changed by the budget alone."""
    warnings: list[str] = field(default_factory=list)
    """Sentences that go with its result, such as on damage to its recording; see `media.losses.note` for their bounds."""


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of one object, where a reference stood."""

    uri: str
    content: bytes
    type: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """`inputs` with a Blob in the place of every reference."""

    work: Work
    inputs: Any


@dataclass(frozen=True, slots=True)
class Decoded:
    """`value` as a pipeline's preprocess takes it: text, PIL image, samples, or a dict of those."""

    work: Work
    value: Any


@dataclass(slots=True)
class Assembly:
    """Collects the outputs of the units of one item. `collect` is called by the device's thread alone."""

    work: Work
    expected: int
    context: Any = None
    """What the adapter's preprocess keeps for its postprocess."""
    outputs: dict[int, Any] = field(default_factory=dict)
    failure: JobFailure | None = None

    def collect(self, index: int, output: Any | JobFailure) -> bool:
        """Note the output of unit `index`, or why it has none. True when it was the last one."""
        if isinstance(output, JobFailure):
            self.failure = self.failure or output
        self.outputs[index] = output
        return len(self.outputs) == self.expected


@dataclass(slots=True)
class Unit:
    """One model input. Units with an equal `key` may share a batch; `length` is what is padded to the longest.

    `fixed` is what a unit costs beside its length, the same for all units of a key.
    """

    assembly: Assembly
    index: int
    key: Any
    length: int
    features: Any
    fixed: int = 0
    created: float = 0.0

    @property
    def priority(self) -> int:
        """The priority of the job it belongs to."""
        return self.assembly.work.job.priority


@dataclass(frozen=True, slots=True)
class Batch:
    """Units that go through the model together."""

    key: Any
    units: Sequence[Unit]

    @property
    def cost(self) -> int:
        """Padded cost: the longest unit, with its fixed part, times their number."""
        return (max(unit.length for unit in self.units) + self.units[0].fixed) * len(self.units)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A part of a result that becomes an object of its own. `encode` gives its bytes, and raises what its codec raises."""

    uri: str
    media_type: str
    encode: Callable[[], bytes]
    size: int
    """Bytes of it in memory."""


@dataclass(slots=True)
class Finished:
    """A result on its way to the store: `value` refers to the `artifacts`, which are taken off the list as they are stored."""

    work: Work
    value: Any
    artifacts: list[Artifact]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A result as it is written: JSON whose artifacts are stored."""

    body: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one item: an `output` (Encoded where the engine writes results, else a value), or a `failure`."""

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
