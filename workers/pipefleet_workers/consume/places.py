"""Buckets that S3 refuses to this worker, which is well otherwise: its jobs there are for workers that are not refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pipefleet import broker
from pipefleet.announcements import announced_workers
from pipefleet.contract import JobMessage
from pipefleet.settings import Settings
from pipefleet.storage import split_uri

NOTED_SECONDS = 120.0
"""How long a refusal is told; longer than the longest pause before the next try."""
MOST_PLACES = 20
"""Buckets that are told at most."""
PASS_ON_SECONDS = 2.0
"""How long a job is kept aside before another worker may take it: else this worker would take it again at once."""


class Places:
    """Which buckets were refused lately, and whether another worker may be allowed there. Thread-safe.

    `clock` is in seconds; only differences count.
    """

    def __init__(
        self, others: Callable[[str], bool] = lambda _: False, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._others = others
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def refused(self, message: JobMessage) -> bool:
        """Note that S3 refused a job's bucket; whether another live worker was not refused there. Raises PipefleetError."""
        uri = message.shard.run_uri if message.shard is not None else message.output
        if uri is None:
            return False
        bucket = split_uri(uri)[0]
        with self._lock:
            self._until.pop(bucket, None)
            self._until[bucket] = self._clock() + NOTED_SECONDS
            if len(self._until) > MOST_PLACES:
                del self._until[next(iter(self._until))]
        return self._others(bucket)

    def told(self) -> list[str]:
        """The buckets that were refused lately."""
        now = self._clock()
        with self._lock:
            return sorted(bucket for bucket, until in self._until.items() if until > now)


class Others:
    """Asks Redis for the other live workers that serve `queue`, and what they are refused."""

    def __init__(self, settings: Settings, queue: str, worker: str) -> None:
        self._settings = settings
        self._queue = queue
        self._worker = worker
        self._redis: Any = broker.connect(settings)

    def __call__(self, bucket: str) -> bool:
        """Whether one of them takes jobs and does not tell that this bucket is refused. Raises ServiceUnavailableError."""
        with broker.redis_errors(self._settings.redis_url):
            workers = announced_workers(self._redis)
        return any(
            facts.get("queue") == self._queue and not facts.get("barred") and bucket not in refused_places(facts)
            for name, facts in workers.items()
            if name != self._worker
        )


def refused_places(facts: Any) -> list[str]:
    """The buckets that a worker tells of as refused to it."""
    told = facts.get("refused")
    return [str(one) for one in told[:MOST_PLACES]] if isinstance(told, list) else []
