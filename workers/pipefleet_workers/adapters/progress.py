"""The calls of an adapter while its forward runs: it gives signs of life and early outputs, and asks for stopped jobs.

The device passes its own `Progress` to `Adapter.run` with every batch. Code that runs a forward without the device, such as the
warm-up, passes `UNOBSERVED`. The thread that called `run` calls all methods, until `run` has returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipefleet.contract.records import JobFailure
from pipefleet_workers.items import JobContext, Unit
from pipefleet_workers.process.watchdog import working_on

STAGE = "forward"


class Progress(Protocol):
    """The observer of one forward."""

    def tick(self) -> None:
        """Give a sign of life: the time limit of the forward starts anew. A forward of many steps calls this at each step."""

    def stopped(self, job: JobContext) -> JobFailure | None:
        """Why a job must stop: it was cancelled, or its deadline has passed. None if the job goes on."""

    def remains(self, unit: Unit) -> bool:
        """Whether the output of a unit is still to come."""

    def wrote(self, unit: Unit, tokens: Sequence[int]) -> None:
        """Tell all new tokens of a unit so far. Called for units of jobs that stream, as often as the forward likes."""

    def release(self, unit: Unit, output: Any) -> None:
        """Hand on the output of a unit before its batch has ended, at most once. `run`'s own output of this unit is dropped."""


class Unobserved:
    """A `Progress` without an observer."""

    def tick(self) -> None:
        """Give a sign of life to whoever watches the calling thread, such as the warm-up's watchdog."""
        working_on(None)

    def stopped(self, job: JobContext) -> JobFailure | None:
        """Why the job must stop, as for a batch on the device."""
        return job.stopped(STAGE)

    def remains(self, unit: Unit) -> bool:
        """Always True: no output is handed on early."""
        return True

    def wrote(self, unit: Unit, tokens: Sequence[int]) -> None:
        """Do nothing."""

    def release(self, unit: Unit, output: Any) -> None:
        """Do nothing: `run` returns the output as well."""


UNOBSERVED: Progress = Unobserved()
