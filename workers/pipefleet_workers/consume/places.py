"""Buckets that S3 refuses to this worker, which is well otherwise. Jobs in these buckets go to workers that are allowed there.

The consumer and the store note refusals here; the worker's announcement lists them (`told`), and other workers read it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.messages import JobMessage
from pipefleet.contract.references import split_uri
from pipefleet.fleet.announcements import MOST_PLACES, announced_workers, refused_places
from pipefleet.settings import Settings
from pipefleet_workers.storage.store import RefusedHereError

NOTED_SECONDS = 120.0
"""How long a refusal is announced; longer than the longest pause before the next try."""
ASK_SECONDS = 1.0
"""How long the answer about other workers is kept: a shard may have thousands of refused items."""
PASS_ON_SECONDS = 2.0
"""How long a job is kept aside before another worker may take it; else this worker would take it again at once."""


class Places:
    """Knows the buckets that were refused lately, and whether another worker may be allowed there. Thread-safe.

    `clock` is in seconds; only differences count.
    """

    def __init__(
        self, others: Callable[[str], bool] = lambda _: False, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._others = others
        self._clock = clock
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}
        self._asked: dict[str, tuple[float, bool]] = {}

    def refused(self, message: JobMessage) -> bool:
        """Note that S3 refused a job's bucket. Returns whether another live worker is allowed there. Raises PipefleetError."""
        uri = message.shard.run_uri if message.shard is not None else message.output
        if uri is None:
            return False
        bucket = split_uri(uri)[0]
        self._note(bucket)
        return self._others(bucket)

    def require(self, bucket: str) -> None:
        """Note that S3 refused something in a bucket. Raises RefusedHereError if another live worker is allowed there.

        The answer about other workers is kept for ASK_SECONDS. Raises ServiceUnavailableError while Redis is away.
        """
        self._note(bucket)
        now = self._clock()
        asked, allowed = self._asked.get(bucket, (float("-inf"), False))
        if now - asked >= ASK_SECONDS:
            allowed = self._others(bucket)
            with self._lock:
                self._asked = {name: self._asked[name] for name in self._until if name in self._asked}
                self._asked[bucket] = now, allowed
        if allowed:
            raise RefusedHereError(f"S3 refuses the bucket {bucket!r} to this worker, and not to others")

    def _note(self, bucket: str) -> None:
        with self._lock:
            self._until.pop(bucket, None)
            self._until[bucket] = self._clock() + NOTED_SECONDS
            if len(self._until) > MOST_PLACES:
                del self._until[next(iter(self._until))]

    def told(self) -> list[str]:
        """The buckets that were refused lately."""
        now = self._clock()
        with self._lock:
            return sorted(bucket for bucket, until in self._until.items() if until > now)


class Others:
    """Asks Redis for the other live workers of `queue`, and for the buckets that are refused to them."""

    def __init__(self, settings: Settings, queue: str, worker: str) -> None:
        self._settings = settings
        self._queue = queue
        self._worker = worker
        self._redis: Any = connect(settings)

    def __call__(self, bucket: str) -> bool:
        """Whether another worker takes jobs and does not announce this bucket as refused. Raises ServiceUnavailableError."""
        with redis_errors(self._settings.redis_url):
            workers = announced_workers(self._redis)
        return any(
            facts.get("queue") == self._queue and not facts.get("barred") and bucket not in refused_places(facts)
            for name, facts in workers.items()
            if name != self._worker
        )
