"""`Tally`: the counters of a consumer, for Prometheus and for the scaler.

The consumer, `singles` and `shards` call it at each event of a message or an item. The numbers go to `observe.metrics` and
`observe.totals`; nothing here waits or fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipefleet.contract.messages import JobMessage, JobState
from pipefleet.contract.records import JobFailure
from pipefleet_workers.consume.held import Delivery
from pipefleet_workers.ending import Ending
from pipefleet_workers.items import Outcome
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.totals import WorkCount


class Tally:
    """Counts messages, the work in them, and the items that end. Thread-safe.

    An item is counted once: by the worker that wrote its record or its part, or noted that its shard was refused. So the sum over
    all workers agrees with the records and parts.
    """

    def __init__(self, metrics: Metrics, work: WorkCount) -> None:
        self._metrics = metrics
        self._work = work

    def taken(self, delivery: Delivery) -> None:
        """A message was delivered, perhaps again after a worker died with it or lost it."""
        self._metrics.message("redelivered" if delivery.deliveries > 1 else "delivered")

    def handed_back(self) -> None:
        """A message went back to its queue."""
        self._metrics.message("handed_back")

    def handed_over(self) -> None:
        """A message of another revision went to the queue of this revision."""
        self._metrics.message("handed_over")

    def done(self, message: JobMessage, ending: Ending) -> None:
        """A message was acknowledged; its work counts if it was done here."""
        if ending.here:
            self._work.add(cost=message.work)

    def items(self, outcomes: Sequence[Outcome]) -> None:
        """The items of a shard have ended, and its part was written here."""
        for state, count in Counter(outcome.state for outcome in outcomes).items():
            self._metrics.ended(state, count)
        failed = [one.failure for one in outcomes if one.failure is not None and one.state is JobState.FAILED]
        for (code, stage), count in Counter((one.code, one.stage) for one in failed).items():
            self._metrics.failure(code=code, stage=stage, count=count)

    def single(self, ending: Ending) -> None:
        """A single job that this worker had begun has ended. A cancelled job counts too, though its canceller wrote its record."""
        if ending.state is JobState.CANCELLED:
            self._metrics.ended(JobState.CANCELLED)
        elif ending.here and ending.state is not None:
            self._metrics.ended(ending.state)
            if ending.state is JobState.FAILED and ending.failure is not None:
                self._metrics.failure(code=ending.failure.code, stage=ending.failure.stage)

    def cancelled(self, count: int) -> None:
        """Items of a shard that this worker had begun ended because their run was cancelled."""
        self._metrics.ended(JobState.CANCELLED, count)

    def refused(self, failure: JobFailure, count: int) -> None:
        """No worker will run a shard of this many items. If the shard is taken up later, its items end and count once more."""
        self._metrics.ended(JobState.FAILED, count)
        self._metrics.failure(code=failure.code, stage=failure.stage, count=count)

    def failed(self, failure: JobFailure) -> None:
        """A single job failed without an outcome: it was refused, or is a dead letter."""
        self._metrics.ended(JobState.FAILED)
        self._metrics.failure(code=failure.code, stage=failure.stage)
