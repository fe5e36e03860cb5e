"""`Delivery`: one message in this worker's hands, and the four ways in which it leaves them.

    delivered ─┬─ done        acknowledged: its results are written
               ├─ give_back   back to its queue: the worker drains, is barred, or another worker must try
               ├─ hand_over   to the queue of another revision
               └─ refuse      to the dead letters: it is no job, is a revoked shard, or failed too often

`celery_task` implements it; the consumer alone ends it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from pipefleet.contract.messages import JobMessage, decode_message
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.ending import Ending


class DrainedError(Exception):
    """The worker shuts down and has not finished this job: its message goes back."""


class RevokedError(Exception):
    """An operator has revoked the job."""


class Delivery(Protocol):
    """A message that was delivered to this worker. Thread-safe.

    Exactly one of `done`, `give_back`, `hand_over` and `refuse` ends it; only the consumer calls them, once.
    """

    id: str
    """Its name in Celery's tools; the job's own id if the job came from our client."""
    payload: Any
    priority: int
    """As in Celery: 0 is served first."""
    deliveries: int
    """How often the message was delivered, this time included; a delivery that was given back does not count."""
    retries: int
    """How often this worker began the job again because a service failed it."""
    revoked: bool
    """True once an operator has revoked the job."""
    deadline: float | None
    """When the message expires by its headers, in seconds since 1970. The job itself may have an earlier deadline."""

    @property
    def lease(self) -> Lease | None:
        """The lease that holds it; None with Celery's own transport."""

    @property
    def lost(self) -> bool:
        """True when the lease ran out and another worker may have the message. Results of this delivery are then not wanted."""

    def started(self, *, quick: bool = False) -> None:
        """Tell Celery that work begins; only the first call counts.

        With `quick` the work probably ends within milliseconds: Celery then hears of its begin together with its end, or within a
        second.
        """

    def done(self, ending: Ending) -> None:
        """Acknowledge the message: the job's results are written."""

    def give_back(self, delay: float = 0.0) -> None:
        """Put the message back to its place in the queue. With a `delay` it waits so many seconds first, and counts as a retry."""

    def hand_over(self, queue: str) -> None:
        """Move the message to another queue, whose workers serve its job. This delivery does not count."""

    def refuse(self, reason: str) -> None:
        """Move the message to the dead letters."""


def job_of(delivery: Delivery) -> JobMessage:
    """The job of a delivery, with the earlier of its two deadlines. Raises ContractError.

    The deadline in the headers of a shard is ignored: its run has no deadline, and a copied header could fail its items.
    """
    message = decode_message(delivery.payload)
    if message.shard is not None:
        return message
    deadlines = [one for one in (message.deadline, delivery.deadline) if one is not None]
    return replace(message, deadline=min(deadlines)) if deadlines else message
