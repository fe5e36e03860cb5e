"""`Tries`: what becomes of a job that a service failed, or whose objects S3 refuses.

    the service is away, or failed this job ─▶ again here, after a pause
    S3 refuses its bucket to this worker    ─▶ back for another worker, uncounted
    S3 refuses its objects                  ─▶ back for another worker, a few times
    too often ─▶ dead letters               the worker drains, or S3 refuses this worker altogether ─▶ back

A failure counts only while the services are well otherwise: an outage makes work wait, and never makes it fail. `Consumer.postpone`
calls it, on any thread; it raises nothing that the services caused.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Protocol

from pipefleet.errors import AccessDeniedError, ObjectRefusedError, PipefleetError, ServiceFullError
from pipefleet.patience import pause
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.held import Delivery, job_of
from pipefleet_workers.consume.later import Later
from pipefleet_workers.consume.places import PASS_ON_SECONDS, Places
from pipefleet_workers.consume.revocations import Revocations
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.storage.store import BarredError, RefusedHereError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """How much a consumer does at once, and how long it goes on trying."""

    shards: int = 8
    """Shards that run at once."""
    denials: int = 4
    """How often a job goes back for another worker when S3 refuses its objects to this worker, which is well otherwise."""
    deliveries: int = 3
    """A message that was delivered this often runs alone; a shard that was delivered more often is split."""
    retries: int = 6
    """How often a job begins again because a service failed only this job; after that its item fails."""
    pause: tuple[float, float] = (1.0, 30.0)
    """Seconds before a job begins again: the first pause and the longest."""


class Ends(Protocol):
    """Where deliveries end; of several calls for one delivery the first counts."""

    def give_back(self, delivery: Delivery, *, delay: float = 0.0, aside: float = 0.0) -> None:
        """Put the message back to its place in the queue."""

    def refuse(self, delivery: Delivery, reason: str) -> None:
        """Move the message to the dead letters."""

    def wait_no_more(self, delivery: Delivery) -> None:
        """Take the delivery out of those that begin later."""


class Tries:
    """Decides on the next try of a job. Thread-safe."""

    def __init__(
        self,
        ends: Ends,
        later: Later[Delivery],
        health: Health,
        revocations: Revocations,
        draining: threading.Event,
        limits: IntakeLimits,
        places: Places,
    ) -> None:
        self._ends = ends
        self._later = later
        self._health = health
        self._revocations = revocations
        self._draining = draining
        self._limits = limits
        self._places = places

    def after(self, delivery: Delivery, error: Exception) -> None:
        """Begin a job again later. A failure counts, up to a bound, while everything else works; an outage does not count."""
        if self._draining.is_set() or delivery.lost or isinstance(error, BarredError):
            return self._ends.give_back(delivery)
        if isinstance(error, RefusedHereError) and delivery.lease is not None:
            return self._pass_on(delivery, error)
        is_well = self._health.check()
        if self._health.barred is not None:
            return self._ends.give_back(delivery)
        if is_well and isinstance(error, AccessDeniedError) and delivery.lease is not None:
            return self._elsewhere(delivery, delivery.lease, error)
        if is_well and isinstance(error, ObjectRefusedError):
            return self._ends.refuse(delivery, str(error))
        if is_well and not isinstance(error, ServiceFullError):
            delivery.retries += 1
        if delivery.retries > self._limits.retries + 1:
            return self._ends.refuse(delivery, f"failed {delivery.retries} times, at last with: {error}")
        self._again_here(delivery, error)

    def _again_here(self, delivery: Delivery, error: Exception) -> None:
        first, longest = self._limits.pause
        seconds = pause(max(0, delivery.retries - 1), first=first, longest=longest)
        log.warning("a job begins again in %.1f s: %s", seconds, error)
        if not self._later.put(delivery, seconds):
            self._ends.give_back(delivery)
        elif delivery.revoked:  # it was revoked during the put, and the revocation did not find it
            self._ends.wait_no_more(delivery)
            self._revocations.order_delivery(delivery)

    def _elsewhere(self, delivery: Delivery, lease: Lease, error: Exception) -> None:
        """Give a job back whose objects S3 refuses. Redis counts these tries, so the job ends when every worker is refused."""
        if self._passed_on(delivery):
            return
        if lease.retries >= self._limits.denials:
            return self._ends.refuse(delivery, f"refused on {lease.retries + 1} tries, at last with: {error}")
        first, longest = self._limits.pause
        seconds = pause(lease.retries, first=first, longest=longest)
        log.warning("a job goes back for another worker to try in %.1f s: %s", seconds, error)
        self._ends.give_back(delivery, delay=seconds)

    def _passed_on(self, delivery: Delivery) -> bool:
        """Whether a job went back uncounted because S3 may allow its bucket to another worker."""
        try:
            if not self._places.refused(job_of(delivery)):
                return False
        except PipefleetError as error:
            log.warning("cannot see whether other workers are refused: %s", error)
            return False
        self._pass_on(delivery, "S3 refuses its bucket to this worker, and not to others")
        return True

    def _pass_on(self, delivery: Delivery, why: object) -> None:
        """Give a job back for another worker, uncounted.

        It is kept aside for a moment; else this worker would take it again at once.
        """
        log.warning("a job goes back: %s", why)
        self._ends.give_back(delivery, aside=PASS_ON_SECONDS)
