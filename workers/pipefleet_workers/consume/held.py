"""`Delivery`: one message in this worker's hands, and the four ways in which it can leave them."""

from __future__ import annotations

from typing import Any, Protocol

from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.ending import Ending


class DrainedError(Exception):
    """The worker shuts down and this job was not finished: its message goes back."""


class RevokedError(Exception):
    """An operator has revoked the job."""


class Delivery(Protocol):
    """A message that was delivered to this worker. Thread-safe.

    Exactly one of `done`, `give_back`, `hand_over` and `refuse` ends it; only the consumer calls them, once.
    """

    id: str
    """The name that Celery's tools know it by; a job's own id where the job came from our client."""
    payload: Any
    priority: int
    """As in Celery: 0 is served first."""
    deliveries: int
    """How often the message was delivered, this time included; giving it back does not count."""
    retries: int
    """How often this worker began it again because a service failed it."""
    revoked: bool
    """True once an operator has revoked it."""
    deadline: float | None
    """When it expires as its headers say, in seconds since 1970; the job may have an earlier deadline of its own."""

    @property
    def lease(self) -> Lease | None:
        """What it is held by; None with Celery's own transport."""

    @property
    def lost(self) -> bool:
        """True when the lease ran out and another worker may have the message: its results are not wanted any more."""

    def started(self) -> None:
        """Tell Celery that work begins; only the first call counts."""

    def done(self, ending: Ending) -> None:
        """Acknowledge: what the job became is written."""

    def give_back(self, delay: float = 0.0) -> None:
        """Put the message back to its place in the queue; with a delay in seconds it is kept aside that long, and counted."""

    def hand_over(self, queue: str) -> None:
        """Move the message to another queue, whose workers serve it; this delivery does not count."""

    def refuse(self, reason: str) -> None:
        """Put the message to the dead letters."""
