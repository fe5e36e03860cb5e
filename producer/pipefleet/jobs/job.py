"""`Job`, the handle of a single job: state, result, cancel.

`Client.submit` and `Client.job` make handles. The state comes from the job's record in Redis, the end from a future of
`waiting.watcher`, a long result from object storage. Errors are the branch JobError of `pipefleet.errors`, and
ServiceUnavailableError.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Generator
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipefleet.arguments import timeout_of
from pipefleet.contract.artifacts import ARTIFACT_KEY, resolve
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import JobRecord
from pipefleet.errors import (
    JobCancelledError,
    JobError,
    JobExpiredError,
    JobFailedError,
    PipefleetError,
    ResultTimeoutError,
)
from pipefleet.patience import PATIENCE_SECONDS, Patience, within
from pipefleet.waiting.watcher import SWEEP_SECONDS, JobFuture, nothing_known

if TYPE_CHECKING:
    from pipefleet.session import Session


SHORTEST_LOOK = 1.0
"""Shortest time in seconds that a look at Redis gets, for any time-out of the caller."""


class Job:
    """One submitted job. Thread-safe; awaitable (`await job` is `job.result()` without blocking the event loop)."""

    def __init__(self, session: Session, job_id: str) -> None:
        self._session = session
        self._future: JobFuture | None = None
        """The only strong reference to the future: without the handle, the watcher drops the job."""
        self._warnings: list[str] | None = None
        self.id = job_id

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    def status(self) -> JobState:
        """The state of the job now. Raises JobError when nothing is known of it (its record is kept for a day)."""
        return self.record().state

    def record(self) -> JobRecord:
        """State, times, worker, seconds by stage, how the model was loaded. Raises JobError when nothing is known of the job."""
        found = self._session.read_records([self.id])[0]
        if found is None:
            raise nothing_known(self.id)
        return found

    @property
    def warnings(self) -> list[str]:
        """Sentences on missing pieces of the result, such as packets of a damaged recording; empty for most jobs.

        Asks Redis unless this handle took the result. Raises JobError when nothing is known of the job.
        """
        return list(self.record().warnings if self._warnings is None else self._warnings)

    def result(self, timeout: float | None = None, *, resolved: bool = True) -> Any:
        """The output, as the pipeline call returns it; waits up to `timeout` seconds (None: without end).

        Unless `resolved`, pictures, sound and long arrays in it stay references to their objects (see `contract.artifacts`).
        While nobody serves the job's queue, the logger `pipefleet` warns of it.

        Raises JobFailedError, JobCancelledError, JobExpiredError or ResultTimeoutError; after the last one the job goes on and can
        be waited for again. Raises JobError when the client is closed, and when nothing is known of the job for 30 s or until the
        timeout; ServiceUnavailableError when Redis or S3 was away for five minutes (`pipefleet.patience.PATIENCE_SECONDS`).
        """
        timeout = timeout_of(timeout)
        late = math.inf if timeout is None else time.monotonic() + timeout
        future = self._watched(timeout)
        try:
            record = future.result(
                None if timeout is None else min(max(0.0, late - time.monotonic()), threading.TIMEOUT_MAX / 2)
            )
        except FutureTimeoutError:
            if future.unknown:
                raise nothing_known(self.id) from None
            why = self.why_waiting()
            text = f"job {self.id} has not finished within {timeout:g} s; it goes on" + (f": {why}" if why else "")
            raise ResultTimeoutError(text) from None
        return Patience(seconds=PATIENCE_SECONDS).call(lambda: self._output(record, resolved=resolved), until=late)

    def _watched(self, timeout: float | None) -> JobFuture:
        """As `watch`, but a server that does not answer never delays the caller beyond `timeout`.

        A look at such a server takes about `redis_timeout`. So only a caller with less time needs a thread for the look. A future
        that hears of the end by itself needs no look, unless the caller leaves before the next sweep.
        """
        heard = self._heard()
        if heard is not None and (timeout is None or timeout > 2 * SWEEP_SECONDS):
            return heard
        if timeout is None or timeout > 2 * self._session.settings.redis_timeout:
            return self.watch()
        try:
            return within(max(SHORTEST_LOOK, timeout), self.watch)
        except TimeoutError:
            raise ResultTimeoutError(
                f"job {self.id} has not finished within {timeout:g} s, and Redis does not answer"
            ) from None

    def cancel(self) -> bool:
        """Cancel the job, wherever it is. True if this call ended it; False if it had ended before or nothing is known of it."""
        return self._session.cancel_job(self.id)

    def why_waiting(self) -> str | None:
        """One sentence if nobody served the job's queue a moment ago; None also in the job's first few seconds. No I/O."""
        future = self._future
        return None if future is None else self._session.watcher.why_waiting(future)

    def watch(self, *, submitting: bool = False) -> JobFuture:
        """The future of the job's final record. See `Watcher.watch`; see `JobFuture` for callbacks."""
        future = self._session.watcher.watch(self.id, submitting=submitting)
        self._future = future
        return future  # not self._future: another thread that took the result may have cleared it

    def _heard(self) -> JobFuture | None:
        """The future, if it ends without a look-up. No I/O."""
        future = self._future
        return future if future is not None and self._session.watcher.hears(future) else None

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        future = self._heard()
        if future is None:
            future = await asyncio.to_thread(self.watch)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        future.add_quick_callback(wake)
        await ended.wait()
        record = future.result()
        if record.output_ref is not None or _has_artifacts(record.output or ""):  # objects are read, which takes long
            return await asyncio.to_thread(self._output, record)
        return self._output(record)

    def _output(self, record: JobRecord, *, resolved: bool = True) -> Any:
        """The output of a final record; with `resolved` its artifacts are read. Raises the error of a job without a result."""
        self._future, self._warnings = None, list(record.warnings)
        self._session.watcher.forget(self.id)
        raise_for(self.id, record)
        text = record.output if record.output_ref is None else self._session.store.get(record.output_ref.uri)
        if text is None:
            raise JobError(f"the record of job {self.id} holds no output")
        output = decode_output(text)
        return resolve(output, self._session.store.get) if resolved and _has_artifacts(text) else output


def _has_artifacts(text: str | bytes) -> bool:
    """Whether the JSON of an output may name artifacts; a walk over a whole output takes far longer than this look."""
    return ARTIFACT_KEY in text if isinstance(text, str) else ARTIFACT_KEY.encode() in text


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


def decode_output(text: str | bytes) -> Any:
    """The JSON of an output. Raises PipefleetError where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise PipefleetError("the stored result is not JSON: was it written by another program?") from None
