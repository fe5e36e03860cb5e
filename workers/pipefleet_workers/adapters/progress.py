"""The calls of an adapter while its forward runs: it gives signs of life and early outputs, and asks for stopped jobs.

The device passes its own `Progress` to `Adapter.run` with every batch. Who runs a forward for itself, such as the warm-up,
passes `UNOBSERVED`. All methods are called by the thread that called `run`, until `run` has returned.
"""

from __future__ import annotations

from typing import Any, Protocol

from pipefleet.contract.records import JobFailure
from pipefleet_workers.items import JobContext, Unit

STAGE = "forward"


class Progress(Protocol):
    """Who hears of one forward."""

    def tick(self) -> None:
        """A sign of life, at each step of a forward that takes many: the time that it may take starts anew."""

    def stopped(self, job: JobContext) -> JobFailure | None:
        """Why a job should go no further, because it was cancelled or its deadline has passed; None where it goes on."""

    def remains(self, unit: Unit) -> bool:
        """Whether the output of a unit is still to come."""

    def release(self, unit: Unit, output: Any) -> None:
        """Hand on the output of a unit before its batch has ended. At most once a unit; what `run` returns for it is dropped."""


class Unobserved:
    """A `Progress` that nobody hears of."""

    def tick(self) -> None:
        """Nothing."""

    def stopped(self, job: JobContext) -> JobFailure | None:
        """Why the job should go no further, as for a batch on the device."""
        return job.stopped(STAGE)

    def remains(self, unit: Unit) -> bool:
        """Always: nothing is handed on early."""
        return True

    def release(self, unit: Unit, output: Any) -> None:
        """Nothing: `run` returns the output as well."""


UNOBSERVED: Progress = Unobserved()
