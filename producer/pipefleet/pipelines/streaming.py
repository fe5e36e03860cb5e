"""A call over many inputs: a thread takes inputs and submits them; the caller takes the results, in order.

inputs ─▶ feeder thread: submit ─▶ jobs under way, at most `bound` ─▶ caller: result of the oldest

`FleetPipeline` calls `stream`. Errors of the inputs and of submitting are raised to the caller, after the results before them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from types import GeneratorType
from typing import Any

from pipefleet.errors import PipefleetError, UsageError
from pipefleet.jobs.job import Job
from pipefleet.service import Service


def stream(
    source: Iterator[Any],
    submit: Callable[[Any], Job],
    result: Callable[[Job], Any],
    *,
    bound: int,
    eager: bool = False,
) -> Generator[Any]:
    """The `result` of each input's job, in the order of the inputs. At most `bound` inputs are taken and not yielded.

    A result is yielded as soon as it is there, although the next input may take long. An error of `source` or `submit` is raised
    after the results before it; with `eager` as soon as possible, and first before any result is waited for. When the caller
    stops, or an error ends the call, jobs under way are cancelled, and a source that is a generator is closed.
    """
    feeder = Feeder(source, submit, bound)
    try:
        feeder.start()
        if eager:
            feeder.wait_until_full()
        while (job := feeder.next_job(eager=eager)) is not None:
            answer = result(job)
            feeder.ended(job)
            yield answer
    finally:
        feeder.stop()


class Feeder:
    """Takes inputs and submits them on a daemon thread. The thread may stay in the source's code for ever; then it holds no job.

    For one caller's thread. A process that was forked after it was made cannot use it.
    """

    def __init__(self, source: Iterator[Any], submit: Callable[[Any], Job], bound: int) -> None:
        self._source = source
        self._submit = submit
        self._bound = bound
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        """Jobs that the caller has not asked for yet."""
        self._current: Job | None = None
        self._under_way = 0
        self._error: BaseException | None = None
        self._done = False
        self._stopped = False
        self._process = os.getpid()
        self._service = Service("pipefleet-feeder", self._feed)

    def start(self) -> None:
        """Begin to take inputs; none are taken after `stop`."""
        self._service.start()

    def wait_until_full(self) -> None:
        """Wait until `bound` inputs are under way or no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._done or len(self._jobs) >= self._bound)

    def next_job(self, *, eager: bool) -> Job | None:
        """The job whose result is due next; None at the end of the inputs. Waits for an input if no job is under way.

        Raises the error that ended the inputs, after the jobs before it; with `eager` at once.
        """
        if os.getpid() != self._process:
            raise UsageError("this iterator of results belongs to the process that made it; call the pipeline anew")
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._done)
            if self._error is not None and (eager or not self._jobs):
                raise self._error
            self._current = self._jobs.popleft() if self._jobs else None
            return self._current

    def ended(self, job: Job) -> None:
        """The caller has taken the result of a job: there is room for another input."""
        with self._changed:
            self._current = None
            self._under_way -= 1
            self._changed.notify_all()

    def stop(self, timeout: float | None = 0.0) -> bool:
        """Take no more inputs, and cancel the jobs under way. Returns whether the thread has ended; it may be in the source's code.

        Raises nothing: the caller's own error matters more.
        """
        if os.getpid() != self._process:
            return True  # the jobs are the parent's
        with self._changed:
            self._stopped = True
            left = [*([self._current] if self._current else []), *self._jobs]
            self._current = None
            self._jobs.clear()
            self._changed.notify_all()
        all(map(_cancel, left))
        return self._service.stop(timeout)

    def _feed(self, stopping: threading.Event) -> None:
        try:
            while self._has_room():
                try:
                    one = next(self._source)
                except StopIteration:
                    break
                if self._stopped:
                    break
                self._add(self._submit(one))
                del one  # else this input would live until the next one comes
        except BaseException as error:  # noqa: BLE001 - raised to the caller, in `next_job`
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()
            if isinstance(self._source, GeneratorType):
                self._source.close()

    def _has_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._under_way < self._bound)
            self._under_way += 1
            return not self._stopped

    def _add(self, job: Job) -> None:
        with self._changed:
            if not self._stopped:
                self._jobs.append(job)
                self._changed.notify_all()
                return
        _cancel(job)  # the caller stopped while it was being submitted


def _cancel(job: Job) -> bool:
    """Cancel a job. False when Redis is away: then the caller cancels no more jobs, or it would wait once for each of them."""
    try:
        job.cancel()
    except PipefleetError:
        return False
    return True
