"""`Tally`: what a consumer counts, for Prometheus and for the scaler."""

from __future__ import annotations

from pipefleet.contract import JobMessage
from pipefleet_workers.consume.delivery import Delivery
from pipefleet_workers.metrics import Metrics
from pipefleet_workers.scaling.ledger import WorkCount

NOTHING_DONE = ("lost", "ended before")
"""States of a delivery whose work was not done here."""


class Tally:
    """Counts messages and the work in them. Thread-safe."""

    def __init__(self, metrics: Metrics, work: WorkCount) -> None:
        self._metrics = metrics
        self._work = work

    def taken(self, delivery: Delivery) -> None:
        """A message was delivered; again, where a worker died with it or lost it."""
        self._metrics.message("redelivered" if delivery.deliveries > 1 else "delivered")

    def handed_back(self) -> None:
        """A message went back to its queue."""
        self._metrics.message("handed_back")

    def handed_over(self) -> None:
        """A message of another revision went to the queue of that."""
        self._metrics.message("handed_over")

    def done(self, message: JobMessage, state: str) -> None:
        """A job ended here."""
        if state not in NOTHING_DONE:
            self._work.add(cost=message.work)
