"""The facts that a worker announces to the fleet: its pool, its budget, whether padding is exact, and the cost of a batch.

They lie in the Redis hash `pipefleet:workers` (see `pipefleet.fleet.announcements`). An entry ends with its heartbeat, or when the
worker signs off. `worker` announces them again and again; errors are redis-py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipefleet.contract.parts import writable_formats
from pipefleet.fleet.announcements import announce_worker, announced_workers
from pipefleet.fleet.pools import Pool
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.keys import WORKERS_KEY
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.observe.totals import ITEM_COUNTS, record_items

if TYPE_CHECKING:
    from pipefleet_workers.consume.health import Health
    from pipefleet_workers.consume.places import Places
    from pipefleet_workers.engine.device import Instruments
    from pipefleet_workers.models.warmup import WarmUp
    from pipefleet_workers.observe.pulse import Beat, Pulse

__all__ = ["WORKERS_KEY", "Facts", "announced_workers"]


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts of one worker."""

    worker: str
    pool: Pool
    limits: BatchLimits
    found: WarmUp
    instruments: Instruments
    pulse: Pulse
    queue: str
    """The queue of the revision that the worker serves."""
    health: Health | None = None
    places: Places | None = None
    loaded: Mapping[str, str] = field(default_factory=dict)
    """What the model runs with, see `precision.how_loaded`."""

    def to_json(self) -> dict[str, Any]:
        """The announced fields; `base` and `per_cost` are the fitted seconds of a batch."""
        service = self.instruments.fit.current()
        fitted = {} if service is None else {"base": service.base, "per_cost": service.per_cost}
        batching = self.found.describe() if self.found.seconds else "not measured"
        return {
            "pool": self.pool.name,
            "queue": self.queue,
            "max_cost": self.limits.max_cost,
            "pads": self.found.pads,
            "lanes": self.found.lanes.count,
            **fitted,
            "batching": batching,
            "loaded": dict(self.loaded),
            **({"barred": self.health.barred} if self.health is not None and self.health.barred else {}),
            **({"refused": refused} if self.places is not None and (refused := self.places.told()) else {}),
            "formats": writable_formats(),
        }

    def announce(self, redis: Any, *, seconds: float) -> None:
        """Announce the facts for `seconds`, and set them as metrics."""
        facts = self.to_json()
        for name in ("max_cost", "pads", "lanes", "base", "per_cost"):
            if name in facts:
                self.instruments.metrics.fact(name, float(facts[name]))
        beat = self._tell(redis)
        announce_worker(redis, self.worker, {**facts, **beat.to_json()}, seconds=seconds)

    def withdraw(self, redis: Any) -> None:
        """The worker ends: remove the entry, and announce its last work."""
        self._tell(redis)
        redis.hdel(WORKERS_KEY, self.worker)

    def _tell(self, redis: Any) -> Beat:
        revision = revision_queue(self.pool.name, self.pool.model, self.pool.revision)
        self.instruments.work.flush(redis, self.pool.name, revision)
        beat = self.pulse.beat()
        record_items(redis, self.pool.name, **{name: getattr(beat, name) for name in ITEM_COUNTS})
        self.pulse.told(beat)
        return beat
