"""Single jobs as the producer sees them: the `Job` handle, and the watcher that hears when jobs end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Generator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING, Any

from pipefleet import broker
from pipefleet.contract import JobState
from pipefleet.errors import (
    JobCancelledError,
    JobError,
    JobExpiredError,
    JobFailedError,
    PipefleetError,
    ResultTimeoutError,
    ServiceUnavailableError,
)
from pipefleet.records import FINISH, JobRecord, finish_arguments, read_record

if TYPE_CHECKING:
    from redis import Redis

    from pipefleet.client import Client

SWEEP_SECONDS = 2.0
"""How often jobs under way are looked up although nothing was heard: a channel forgets what it sent to nobody."""


class Job:
    """One submitted job. Thread-safe; awaitable (`await job` is `job.result()` without blocking the event loop)."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self.id = job_id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self) -> JobState:
        """Where the job is now. Raises JobError when nothing is known of it (its record is kept for a day)."""
        return self.record().state

    def record(self) -> JobRecord:
        """State, times, worker and stage timings. Raises JobError when nothing is known of the job."""
        found = self._client.read_records([self.id])[0]
        if found is None:
            raise JobError(f"nothing is known of job {self.id}: it never was, or its record has expired")
        return found

    def result(self, timeout: float | None = None) -> Any:
        """The output, as the pipeline call returns it; waits up to `timeout` seconds (None: without end).

        Raises JobFailedError, JobCancelledError, JobExpiredError or ResultTimeoutError; after the last one the job
        goes on and can be waited for again.
        """
        future = self._client.watcher.watch(self.id)
        try:
            record = future.result(timeout)
        except FutureTimeoutError:
            raise ResultTimeoutError(f"job {self.id} has not finished within {timeout} s; it goes on") from None
        except CancelledError:
            raise JobError(f"the client was closed while job {self.id} was waited for") from None
        return self._client.output_of(self.id, record)

    def cancel(self) -> bool:
        """Cancel the job wherever it is. True if that ended it, False if it had ended before."""
        return self._client.cancel_job(self.id)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        future = self._client.watcher.watch(self.id)
        record = await asyncio.shield(asyncio.wrap_future(future))
        return await asyncio.to_thread(self._client.output_of, self.id, record)


def raise_for(job_id: str, record: JobRecord) -> None:
    """Raise the error of a job that ended without a result."""
    if record.state is JobState.CANCELLED:
        raise JobCancelledError(f"job {job_id} was cancelled")
    if record.state is JobState.EXPIRED:
        raise JobExpiredError(f"job {job_id} expired before it could finish")
    if record.state is JobState.FAILED:
        failure = record.failure
        code, message, stage = (failure.code, failure.message, failure.stage) if failure else ("failed", "", "")
        raise JobFailedError(f"{message} (code {code}, stage {stage})", failure_code=code, stage=stage)


class Watcher:
    """One thread per client that resolves the futures of its jobs, by channel and, in case it misses one, by sweep."""

    def __init__(self, redis: Redis, channel: str, url: str) -> None:
        self._redis = redis
        self._channel = channel
        self._url = url
        self._futures: dict[str, Future[JobRecord]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._closed = False

    def watch(self, job_id: str, *, submitting: bool = False) -> Future[JobRecord]:
        """The future of a job's final record. With `submitting`, returns only when its end cannot be missed."""
        with self._lock:
            future = self._futures.get(job_id)
            if future is None:
                future = self._futures[job_id] = Future()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pipefleet-watcher", daemon=True)
                self._thread.start()
        if submitting:
            self._ready.wait(5.0)
        elif not future.done():
            self._look_up([job_id])
        return future

    def forget(self, job_id: str) -> None:
        """Drop a job whose result was read, so that a long-lived client does not grow."""
        with self._lock:
            self._futures.pop(job_id, None)

    def close(self) -> None:
        """End the thread and cancel the futures that are still open."""
        self._closed = True
        if self._thread is not None:
            self._thread.join(SWEEP_SECONDS + 1.0)
        with self._lock:
            for future in self._futures.values():
                future.cancel()

    def _run(self) -> None:
        while not self._closed:
            try:
                with broker.redis_errors(self._url):
                    self._listen()
            except ServiceUnavailableError:
                # Nothing is lost: whoever waits goes on waiting, and the sweep after reconnecting looks up all jobs.
                time.sleep(0.5)

    def _listen(self) -> None:
        with broker.subscribed(self._redis, self._channel) as channel:
            next_sweep = 0.0
            while not self._closed:
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
        for start in range(0, len(job_ids), 500):
            ids = job_ids[start : start + 500]
            pipe = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipe.hgetall(broker.job_key(job_id))
            with broker.redis_errors(self._url):
                found = pipe.execute()
            for job_id, raw in zip(ids, found, strict=True):
                record = read_record(raw)
                if record is not None and record.state.final:
                    self._resolve(job_id, record)

    def _resolve(self, job_id: str, record: JobRecord) -> None:
        with self._lock:
            future = self._futures.get(job_id)
            if future is not None and not future.done():
                future.set_result(record)


def cancel(redis: Redis, job_id: str, *, ttl: float, reply: str | None) -> bool:
    """Bring a job to the state cancelled unless it has ended, and tell the workers."""
    arguments = finish_arguments(job_id, JobState.CANCELLED, time.time(), ttl=ttl, reply=reply, fields={})
    ended = redis.eval(FINISH, 1, broker.job_key(job_id), *arguments)
    redis.publish(broker.CANCELLED_CHANNEL, job_id)
    return bool(ended)


def decode_output(text: str | bytes) -> Any:
    """The JSON of an output. Raises PipefleetError where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        raise PipefleetError("the stored result is not JSON: was it written by another program?") from None
