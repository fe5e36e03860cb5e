"""Finds the queue where a job of another model or revision is served: a worker never fails a job that another worker serves.

Such jobs come through the queue of the pool: from producers of a release without queues of revisions, and from any Celery client
that names a model. `Jobs.elsewhere` asks; the answer is a queue, or None. Raises ServiceUnavailableError while Redis is away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pipefleet.connection.clock import ServerClock
from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.messages import JobMessage
from pipefleet.errors import UnknownModelError
from pipefleet.fleet.announcements import announced_fleet
from pipefleet.fleet.latest import LatestFleet
from pipefleet.fleet.pools import Fleet
from pipefleet.fleet.routing import work_queue
from pipefleet.queues.revision_notes import note_revision
from pipefleet.settings import Settings

FRESH_SECONDS = 2.0
"""How long the workers' announcements are used without reading them again. A job without an answer in them reads them anew."""


class Elsewhere:
    """Finds the queue of another revision, from live workers and from the fleet file. Thread-safe."""

    def __init__(
        self,
        settings: Settings,
        fleet_file: LatestFleet | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._fleet_file = fleet_file
        self._redis: Any = connect(settings)
        self._server = ServerClock(self._redis)
        self._clock = clock
        self._announced = Fleet({})
        self._read_at = -FRESH_SECONDS
        self._lock = threading.Lock()

    def queue_for(self, message: JobMessage) -> str | None:
        """The queue of the revision that a job wants; None where no worker serves it. Raises ServiceUnavailableError."""
        with self._lock:
            fresh = self._clock() - self._read_at < FRESH_SECONDS
            found = _find(message, self._announced) if fresh else None
            found = found or _find(message, self._announced_now())
        if found is None and self._fleet_file is not None:
            found = _find(message, self._fleet_file.fleet(at_once=True))
        if found is not None:
            with redis_errors(self._settings.redis_url):
                note_revision(self._redis, found, message.model, message.revision, now=self._server.now())
        return found

    def _announced_now(self) -> Fleet:
        with redis_errors(self._settings.redis_url):
            self._announced = announced_fleet(self._redis)
        self._read_at = self._clock()
        return self._announced


def _find(message: JobMessage, fleet: Fleet) -> str | None:
    try:
        return work_queue(fleet.find(message.task, message.model or "", message.revision), fleet)
    except UnknownModelError:
        return None
