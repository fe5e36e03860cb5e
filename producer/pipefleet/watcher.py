"""The watcher hears when jobs end: one thread for each client resolves the futures of its jobs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from pipefleet import broker
from pipefleet.errors import JobError, PipefleetError, ServiceUnavailableError
from pipefleet.records import JobRecord, read_record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis import Redis

SWEEP_SECONDS = 2.0
"""How often jobs under way are looked up although nothing was heard: a channel forgets what it sent to nobody."""
UNKNOWN_SECONDS = 30.0
"""How long a job without a record is waited for: one that another Celery client queued has none before a worker starts it."""
BATCH = 500


class JobFuture(Future[JobRecord]):
    """The final record of one job, or the error that nobody can have it. It cannot be cancelled: many may wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.unknown_since: float | None = None
        """Since when (monotonic seconds) look-ups have found no record; None while there is one."""


def nothing_known(job_id: str) -> JobError:
    """The error of a job without a record."""
    return JobError(
        f"nothing is known of job {job_id}: it never was, no worker has met it yet, or its record has expired"
    )


class Watcher:
    """Resolves futures by the client's channel and, in case that misses one, by sweep. Thread-safe.

    It holds a future only as long as somebody else does.
    """

    def __init__(self, redis: Redis, channel: str, url: str) -> None:
        self._redis = redis
        self._channel = channel
        self._url = url
        self._futures: WeakValueDictionary[str, JobFuture] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._closed = threading.Event()

    def watch(self, job_id: str, *, submitting: bool = False) -> JobFuture:
        """The future of a job's final record. With `submitting`, returns only when its end cannot be missed.

        Raises JobError when the client is closed, ServiceUnavailableError when Redis is away.
        """
        future = self._future(job_id)
        if submitting:
            self._wait_until_ready()
        elif not future.done():
            self._look_up([job_id])
        return future

    def forget(self, job_id: str) -> None:
        """Drop a job whose record was read, though its handle may live on."""
        with self._lock:
            self._futures.pop(job_id, None)

    def close(self) -> None:
        """End the thread, and fail the futures that are still open with JobError."""
        with self._lock:
            self._closed.set()
            thread, futures = self._thread, list(self._futures.items())
        if thread is not None:
            thread.join(SWEEP_SECONDS + 1.0)
        for job_id, future in futures:
            self._resolve(future, JobError(f"the client was closed while job {job_id} was waited for"))

    def _future(self, job_id: str) -> JobFuture:
        with self._lock:
            future = self._futures.get(job_id)
            if self._closed.is_set() and not (future is not None and future.done()):
                raise JobError(f"the client is closed; make a new one and wait for `client.job({job_id!r})`")
            if future is None:
                future = self._futures[job_id] = JobFuture()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pipefleet-watcher", daemon=True)
                self._thread.start()
        return future

    def _wait_until_ready(self) -> None:
        if not self._ready.is_set():
            with broker.redis_errors(self._url):
                self._redis.ping()  # says at once what the thread would go on trying to say
            self._ready.wait(5.0)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                with broker.redis_errors(self._url):
                    self._listen()
            except ServiceUnavailableError:
                # Nothing is lost: whoever waits goes on waiting, and the sweep after reconnecting looks up all jobs.
                self._closed.wait(0.5)

    def _listen(self) -> None:
        with broker.subscribed(self._redis, self._channel) as channel:
            next_sweep = 0.0
            while not self._closed.is_set():
                message = channel.get_message(timeout=0.2)
                ended: list[str] = []
                while message is not None:
                    if message["type"] == "message":
                        ended.append(message["data"].decode())
                    else:
                        self._ready.set()
                    message = channel.get_message()
                if time.monotonic() >= next_sweep:
                    ended, next_sweep = self._open(), time.monotonic() + SWEEP_SECONDS
                if ended:
                    self._look_up(ended)

    def _open(self) -> list[str]:
        with self._lock:
            return [job_id for job_id, future in self._futures.items() if not future.done()]

    def _look_up(self, job_ids: list[str]) -> None:
        for start in range(0, len(job_ids), BATCH):
            ids = job_ids[start : start + BATCH]
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hgetall(broker.job_key(job_id))
            with broker.redis_errors(self._url):
                found = pipe.execute()
            for job_id, raw in zip(ids, found, strict=True):
                self._take(job_id, raw)

    def _take(self, job_id: str, raw: Mapping[bytes, bytes]) -> None:
        """Note what a look-up found of one job."""
        with self._lock:
            future = self._futures.get(job_id)
        if future is None:
            return
        try:
            record = read_record(raw)
        except PipefleetError as error:
            self._resolve(future, error)
            return
        if record is None:
            self._note_unknown(job_id, future)
            return
        future.unknown_since = None
        if record.state.final:
            self._resolve(future, record)

    def _note_unknown(self, job_id: str, future: JobFuture) -> None:
        now = time.monotonic()
        if future.unknown_since is None:
            future.unknown_since = now
        elif now - future.unknown_since >= UNKNOWN_SECONDS:
            self._resolve(future, nothing_known(job_id))

    def _resolve(self, future: JobFuture, end: JobRecord | PipefleetError) -> None:
        """Resolve a future, unless another thread was faster."""
        with self._lock:
            if future.done():
                return
            if isinstance(end, JobRecord):
                future.set_result(end)
            else:
                future.set_exception(end)
