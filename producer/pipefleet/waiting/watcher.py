"""The watcher: one thread for each client hears when jobs end and resolves their futures.

    worker ─ publish ─▶ done:<client> ─▶ the thread ─▶ resolve the future ─▶ Job.result, `await`, callbacks
                                             ├── a notice without the record, of an earlier release: look it up
                                             └── every SWEEP_SECONDS: look up all jobs under way

Jobs ask for futures with `watch`. Redis may be away for PATIENCE_SECONDS; then the open futures fail with
ServiceUnavailableError.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pipefleet.connection.answers import word_of
from pipefleet.connection.connect import subscribed
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.records import JobRecord, read_notice, read_record
from pipefleet.errors import JobError, PipefleetError, ServiceUnavailableError
from pipefleet.forking import renew_after_fork
from pipefleet.patience import PATIENCE_SECONDS
from pipefleet.queues.keys import job_key, reply_channel
from pipefleet.service import Service
from pipefleet.waiting.callbacks import Callbacks
from pipefleet.waiting.lookout import Lookout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis import Redis

log = logging.getLogger(__name__)
SWEEP_SECONDS = 2.0
"""Seconds between two sweeps, which look up all jobs under way: a Redis channel keeps no message that nobody received."""
UNKNOWN_SECONDS = 30.0
"""Seconds for which a job without a record is waited for. A job that a plain Celery client queued has no record until a worker
starts it."""
LOOK_AFTER_SECONDS = 0.5
"""Age of a job at which a sweep first asks whether a worker serves its queue. With the sweep the warning comes within 3 s."""
BATCH = 500
"""Jobs that are looked up in one round trip."""


class JobFuture(Future[JobRecord]):
    """The final record of one job, or an error if there is none. It cannot be cancelled, because several callers may wait for it.

    Done-callbacks run one after another on a thread of the client's. They may wait for other jobs. A slow callback delays other
    callbacks, but no result and no `await`.
    """

    def __init__(self, callbacks: Callbacks) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.queued_at = 0.0
        """The time (monotonic seconds) at which this process had queued the job. A look-up before it may have missed the record."""
        self.unknown_since: float | None = None
        """The time (monotonic seconds) since which look-ups find no record; None while there is a record."""
        self.queue: str | None = None
        """The queue that the record names; None before the first look-up."""
        self.since = time.monotonic()
        """The time (monotonic seconds) since which somebody waits for the job."""
        self.channel: str | None = None
        """The client's channel, if it was subscribed before the job was queued; the notice of the end comes there."""
        self._callbacks = callbacks

    @property
    def unknown(self) -> bool:
        """Whether the last look-up found no record, although the job should have one by now."""
        return self.unknown_since is not None and self.unknown_since >= self.queued_at

    def add_done_callback(self, function: Callable[[Future[JobRecord]], Any]) -> None:
        """Call `function(self)` when the job has ended; soon if it has ended already."""
        self.add_quick_callback(lambda future: self._callbacks.run(lambda: function(future)))

    def add_quick_callback(self, function: Callable[[Future[JobRecord]], Any]) -> None:
        """Call `function(self)` at once, on the thread that hears of the end. Only for functions that never wait."""
        super().add_done_callback(function)


def nothing_known(job_id: str) -> JobError:
    """The error of a job without a record."""
    return JobError(
        f"nothing is known of job {job_id}: it never was, no worker has met it yet, or its record has expired"
    )


class Watcher:
    """Resolves futures when the client's channel names their jobs, and by a sweep if the channel missed one. Thread-safe.

    The watcher holds only weak references to futures. In a forked process it has a thread and a channel of its own; there the sweep
    finds the jobs that the parent submitted.
    """

    def __init__(self, redis: Redis, url: str, lookout: Lookout) -> None:
        self._redis = redis
        self._url = url
        self._closed = False
        self._callbacks = Callbacks()
        self._lookout = lookout
        self._service = Service("pipefleet-watcher", self._run)
        self._start_afresh()
        renew_after_fork(self)

    def _start_afresh(self) -> None:
        self.channel = reply_channel(uuid.uuid4().hex)
        """The Redis channel on which workers publish the ends of this client's jobs, in this process."""
        self._futures: WeakValueDictionary[str, JobFuture] = WeakValueDictionary()
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._reached = False
        self._away_since: float | None = None
        """The time (monotonic seconds) since which Redis does not answer; None while it answers."""

    def after_fork(self) -> None:
        """Start afresh in the child: a caller there asks for the future again, and the child's own thread resolves it."""
        self._start_afresh()

    def watch(self, job_id: str, *, submitting: bool = False) -> JobFuture:
        """The future of a job's final record. With `submitting` it waits for the channel's subscription, so that no end is missed.

        Raises JobError when the client is closed, and ServiceUnavailableError when Redis was never reached; with `submitting` also
        when Redis is away. The future fails with ServiceUnavailableError when Redis was away for PATIENCE_SECONDS.
        """
        future = self._future(job_id)
        if submitting:
            future.channel = self.channel if self._wait_until_ready() else None
        elif not future.done():
            try:
                self._look_up([job_id])
            except ServiceUnavailableError:  # the thread goes on trying, and fails the future after PATIENCE_SECONDS
                if not self._reached:
                    raise  # rather a wrong address or password than an outage
        return future

    def hears(self, future: JobFuture) -> bool:
        """Whether this process listens where the notice of the job's end comes; then no look-up is needed. No I/O."""
        return future.channel == self.channel and self._service.running

    def forget(self, job_id: str) -> None:
        """Drop the future of a job whose record was read. A future that is not done stays: somebody waits for the job anew."""
        with self._lock:
            future = self._futures.get(job_id)
            if future is not None and future.done():
                del self._futures[job_id]

    def start(self) -> None:
        """Begin to listen; `watch` does this by itself."""
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Listen no more until the next `watch`. Whether the thread has ended within `timeout` seconds."""
        return self._service.stop(timeout)

    def close(self) -> None:
        """End the thread for good, and fail the open futures with JobError."""
        with self._lock:
            self._closed = True
            futures = list(self._futures.items())
        self.stop(SWEEP_SECONDS + 1.0)
        for job_id, future in futures:
            _resolve(future, JobError(f"the client was closed while job {job_id} was waited for"))
        self._callbacks.stop(0.0)

    def why_waiting(self, future: JobFuture) -> str | None:
        """One sentence if nobody served the job's queue at the last look; else None. No I/O."""
        return None if future.queue is None else self._lookout.known(future.queue)

    def _future(self, job_id: str) -> JobFuture:
        with self._lock:
            future = self._futures.get(job_id)
            if self._closed and not (future is not None and future.done()):
                raise JobError(f"the client is closed; make a new one and wait for `client.job({job_id!r})`")
            if future is None:
                future = self._futures[job_id] = JobFuture(self._callbacks)
            if not self._closed:
                self.start()
        return future

    def _wait_until_ready(self) -> bool:
        if self._ready.is_set():
            return True
        with redis_errors(self._url):
            self._redis.ping()  # raises at once, where the thread would go on trying
        return self._ready.wait(5.0)

    def _run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            try:
                with redis_errors(self._url):
                    self._listen(stopping)
            except PipefleetError as error:
                # Nothing is lost: callers go on waiting, and the sweep after reconnecting looks up all jobs.
                self._note_outage(error)
                stopping.wait(0.5)
            except Exception:  # without this thread no caller would ever hear of an end
                log.exception("watching jobs failed and goes on")
                stopping.wait(0.5)
        self._ready.clear()

    def _note_outage(self, error: PipefleetError) -> None:
        """Fail every open future once Redis was away for PATIENCE_SECONDS, or at once if the error is not retryable."""
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        if error.retryable and now - self._away_since < PATIENCE_SECONDS:
            return
        for job_id in self._open():
            with self._lock:
                future = self._futures.get(job_id)
            if future is not None:
                _resolve(future, error)

    def _listen(self, stopping: threading.Event) -> None:
        with subscribed(self._redis, self.channel) as channel:
            next_sweep = 0.0
            while not stopping.is_set():
                message = channel.get_message(timeout=0.2)
                ended: list[str] = []
                while message is not None:
                    if message["type"] == "message":
                        ended += self._without_record(message["data"])
                    else:
                        self._reached = True
                        self._ready.set()
                    message = channel.get_message()
                if ended:
                    self._look_up(ended)
                if time.monotonic() >= next_sweep:
                    self._sweep()
                    self._away_since = None
                    next_sweep = time.monotonic() + SWEEP_SECONDS

    def _without_record(self, notice: bytes) -> list[str]:
        """Resolve the future of the job that a notice names. Returns its id if the notice holds no record."""
        job_id, record = read_notice(notice)
        if record is None:
            return [job_id]
        with self._lock:
            future = self._futures.get(job_id)
        if future is not None:
            future.unknown_since, future.queue = None, record.queue
            _resolve(future, record)
        return []

    def _sweep(self) -> None:
        """Look up every job under way, and warn of queues that nobody serves."""
        self._look_up(self._open())
        begun = time.monotonic() - LOOK_AFTER_SECONDS
        with self._lock:
            futures = list(self._futures.values())
        for queue in {one.queue for one in futures if one.queue and not one.done() and one.since <= begun}:
            self._lookout.look(queue)

    def _open(self) -> list[str]:
        with self._lock:
            return [job_id for job_id, future in self._futures.items() if not future.done()]

    def _look_up(self, job_ids: list[str]) -> None:
        for start in range(0, len(job_ids), BATCH):
            ids = job_ids[start : start + BATCH]
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hgetall(job_key(job_id))
            asked = time.monotonic()
            with redis_errors(self._url):
                found = pipe.execute(raise_on_error=False)
            for job_id, raw in zip(ids, found, strict=True):
                self._take(job_id, raw, asked)

    def _take(self, job_id: str, raw: Mapping[bytes, bytes] | Exception, asked: float) -> None:
        """Take one job's answer of a look-up: its record, or an error of Redis, which ends this job's future alone.

        `asked` is the time (monotonic seconds) of the look-up.
        """
        with self._lock:
            future = self._futures.get(job_id)
        if future is None or (isinstance(raw, Exception) and word_of(raw) is not None):
            return  # nobody waits any more, or Redis cannot answer now and the next sweep asks again
        try:
            with redis_errors(self._url):
                if isinstance(raw, Exception):
                    raise raw
            record = read_record(raw)
        except PipefleetError as error:
            _resolve(future, error)
            return
        if record is None:
            self._note_unknown(job_id, future, asked)
            return
        future.unknown_since, future.queue = None, record.queue
        if record.state.final:
            _resolve(future, record)

    def _note_unknown(self, job_id: str, future: JobFuture, asked: float) -> None:
        if not future.unknown:
            future.unknown_since = asked
        elif asked - (future.unknown_since or asked) >= UNKNOWN_SECONDS:
            _resolve(future, nothing_known(job_id))


def _resolve(future: JobFuture, end: JobRecord | PipefleetError) -> None:
    """Resolve a future, unless another thread was faster. Never call it under a lock: it runs quick callbacks of event loops."""
    with suppress(InvalidStateError):
        if isinstance(end, JobRecord):
            future.set_result(end)
        else:
            future.set_exception(end)
