"""`Ending`: how a job ended, in the words of its record and of Celery's tools.

`results` makes it when a record or a part is written. `consume` passes it on to Celery's events and to the counters. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipefleet.contract.messages import JobState
from pipefleet.contract.records import JobFailure
from pipefleet_workers.items import Outcome

REVOKED = "revoked by an operator"


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a job's time in this worker.

    `state` is the final state that the job has reached, here or elsewhere; None if another worker has the job. `text` is for people
    and holds nothing of the inputs. `here` is True if this worker wrote the state.
    """

    state: JobState | None
    text: str = ""
    here: bool = True
    failure: JobFailure | None = None
    """Why a single job has no result, if this worker wrote this."""


LOST = Ending(None, "another worker has the job", here=False)
SHARD_CANCELLED = Ending(JobState.CANCELLED, "the run was cancelled")


def before(state: JobState) -> Ending:
    """The ending of a job that had its final state before this worker could run or report it."""
    return Ending(state, f"{state} before", here=False)


def single_ending(state: JobState, failure: JobFailure | None) -> Ending:
    """The ending of a single job whose state was written here. For a failure it has code and stage; the record has the rest."""
    return Ending(state, str(state) if failure is None else f"{failure.code} in {failure.stage}", failure=failure)


def shard_ending(outcomes: Sequence[Outcome]) -> Ending:
    """The ending of a shard whose part is written: the shard is done, however many of its items failed."""
    failed = sum(outcome.failure is not None for outcome in outcomes)
    told = f", {failed} failed" if failed else ""
    return Ending(JobState.SUCCEEDED, f"{len(outcomes) - failed} succeeded{told}")
