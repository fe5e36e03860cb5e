"""`Audience`: whether anybody hears the events of this worker, so that events which nobody hears need not be made.

    publish ─▶ Redis answers how many hear it ─▶ nobody: for PROBE_SECONDS no further event needs to be published

A channel of `transport` notes the answers, in the thread of Celery's event loop; `consume.celery_task` asks before it makes an
event. A listener of Celery's (Flower, `celery events`) first asks the workers for a heartbeat. The answer to this heartbeat shows
the listener at once; any other listener misses events of PROBE_SECONDS at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PROBE_SECONDS = 0.1
"""After so many seconds an event is published again to see whether somebody hears it now."""


class Audience:
    """The listeners of one exchange, as the last publishes found them. `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unheard_until = 0.0

    @property
    def absent(self) -> bool:
        """Whether nobody heard the last event, a moment ago."""
        return self._clock() < self._unheard_until

    def note(self, routing_key: str, listeners: int) -> None:
        """So many listeners have heard an event. Only task events tell of an absence: heartbeats have other listeners."""
        if listeners:
            self._unheard_until = 0.0
        elif routing_key.startswith("task."):
            self._unheard_until = self._clock() + PROBE_SECONDS


def audience_of(eventer: Any) -> Audience | None:
    """The audience of Celery's event dispatcher; None where its transport counts no listeners, or before its first event."""
    channel = getattr(getattr(eventer, "producer", None), "_channel", None)
    found = getattr(channel, "audience", None)
    return found if isinstance(found, Audience) else None
