"""The types of one turn of the device: schedule → execute → update.

    Schedule: the batch that runs next ─▶ Step: that batch while it runs ─▶ Update: the units that ended, were aborted, remain

`Device` makes and takes all three. A unit of a schedule ends in exactly one update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.progress import STAGE
from pipefleet_workers.engine.transfer import Staged
from pipefleet_workers.items import Batch, JobContext, Unit

OnText = Callable[[Unit, Sequence[int]], None]
"""Gets the new tokens of a unit so far, while its text is written."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The next batch of the device; `batch` is None if all its units were aborted."""

    batch: Batch | None
    staged: Staged | None = None
    """The batch's inputs, on their way to the device; None if they are collated only when the batch runs."""


@dataclass(frozen=True, slots=True)
class Update:
    """The ends of units. An Update comes when units are aborted, at each early output of a batch, and at its end."""

    scheduled: Sequence[Unit] = ()
    """The units of the batch that runs."""
    ended: Sequence[tuple[Unit, Any | JobFailure]] = ()
    """Units that ran, each with its output or its failure."""
    aborted: Sequence[tuple[Unit, JobFailure]] = ()
    """Units that never run, because their job was stopped or another unit of their item has failed."""
    remaining: Sequence[Unit] = ()
    """The units of the batch that still run."""


class Step:
    """One batch while it runs: the `Progress` that the adapter gets. For the thread of one lane."""

    def __init__(
        self,
        batch: Batch,
        on_tick: Callable[[], None],
        on_update: Callable[[Update], None],
        on_text: OnText = lambda unit, tokens: None,
    ) -> None:
        self._scheduled = batch.units
        self._remaining = {id(unit): unit for unit in batch.units}
        self._on_tick = on_tick
        self._on_update = on_update
        self._on_text = on_text

    def tick(self) -> None:
        """Give a sign of life from inside the forward."""
        self._on_tick()

    def stopped(self, job: JobContext) -> JobFailure | None:
        """Why a job must stop; None if it goes on."""
        return job.stopped(STAGE)

    def remains(self, unit: Unit) -> bool:
        """Whether a unit has not ended yet."""
        return id(unit) in self._remaining

    def wrote(self, unit: Unit, tokens: Sequence[int]) -> None:
        """Tell all new tokens of a unit so far."""
        self._on_text(unit, tokens)

    def release(self, unit: Unit, output: Any) -> None:
        """Hand on the output of a unit before the batch has ended."""
        self._end([(unit, output)])

    def end(self, outputs: Sequence[tuple[Unit, Any | JobFailure]]) -> None:
        """End the batch with the outputs of all its units. Outputs of units that were released earlier are dropped."""
        self._end([(unit, output) for unit, output in outputs if self.remains(unit)])

    def _end(self, ended: Sequence[tuple[Unit, Any | JobFailure]]) -> None:
        for unit, _ in ended:
            del self._remaining[id(unit)]
        self._on_update(Update(self._scheduled, ended, remaining=list(self._remaining.values())))
