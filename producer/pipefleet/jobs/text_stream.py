"""`TextStream`: the text of a job, piece by piece, while a worker writes it.

    worker ─ XADD ─▶ text:<job> ─ XREAD ─▶ TextStream ─▶ pieces; at the end the rest of the job's result

`FleetPipeline.stream` makes it. The result of the job alone counts: a piece that was lost comes at the end, with the rest.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError, ResultTimeoutError, ServiceUnavailableError
from pipefleet.queues.keys import text_key

if TYPE_CHECKING:
    from pipefleet.jobs.job import Job
    from pipefleet.session import Session

log = logging.getLogger(__name__)
READ_SECONDS = 0.2
"""Longest time of one read. After it the job itself is asked, since a worker that died wrote no end."""
PIECES = 100
"""Most pieces of one read."""


class TextStream(Iterator[str], AsyncIterator[str]):
    """The pieces of the text that one job writes. Thread-safe; each piece goes to one reader.

    The joined pieces are the text of `result()`. `close`, and the end of a `with` block, cancel a job that goes on; a read of
    another thread or task then ends. A task that is cancelled at `async for`, or an `asyncio.wait_for`, loses no piece: the next
    read returns it.

    Raises the errors of `Job.result`. ResultTimeoutError comes when no piece came for `timeout` seconds; then the job is cancelled.
    """

    def __init__(self, session: Session, job: Job, timeout: float | None) -> None:
        self.job = job
        self.text = ""
        """The text so far."""
        self._session = session
        self._timeout = timeout
        self._output: Any = None
        self._last = "0"
        self._ended = False
        """Whether no further piece comes from Redis."""
        self._over = threading.Event()
        """Set when nothing is left to read, and by `close`."""
        self._reading = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        """The thread of `async for`. The event loop's own threads are few; streams that wait would take all of them."""
        self._coming: Future[str] | None = None
        """The read of a task, until the task has its piece."""

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        piece = self._piece()
        if not piece:
            raise StopIteration
        return piece

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        while True:
            if self._coming is None:
                if self._over.is_set():
                    raise StopAsyncIteration
                self._thread = self._thread or ThreadPoolExecutor(1, "text-stream")
                self._coming = self._thread.submit(self._piece)
            coming = self._coming
            read = asyncio.wrap_future(coming)
            await asyncio.wait([read])  # a task that is cancelled here leaves the read to the next one
            is_mine = self._coming is coming
            if is_mine:
                self._coming = None
            piece = read.result()
            if not piece:
                raise StopAsyncIteration
            if is_mine:
                return piece

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def result(self) -> Any:
        """The result of the job, as the pipeline call returns it. Reads the rest of the text first."""
        for _ in self:
            pass
        return self.job.result(self._timeout) if self._output is None else self._output

    def close(self) -> None:
        """Read no more, and cancel the job unless it has ended."""
        self._over.set()
        if self._output is None:
            self._cancel()
        self._let_go()

    def _piece(self) -> str:
        """The next piece; empty at the end, and behind an error."""
        with self._reading:
            piece = ""
            try:
                piece = "" if self._over.is_set() else self._next_text()
            except BaseException:
                self._over.set()
                self._cancel()
                raise
            finally:
                if not piece:
                    self._over.set()
                    self._let_go()
            return piece

    def _next_text(self) -> str:
        while not self._ended:
            piece, self._ended = self._next_piece()
            self.text += piece
            if piece or self._over.is_set():
                return piece
        if self._output is not None:
            return ""
        try:
            self._output = self.job.result(self._timeout)
        except ResultTimeoutError:
            raise self._late("gave no result") from None
        rest = self._rest(written_text(self._output))
        self.text += rest
        return rest

    def _let_go(self) -> None:
        """End the thread behind its read, which goes on for at most `READ_SECONDS`."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _next_piece(self) -> tuple[str, bool]:
        """The text that came since the last piece, and whether the job has ended. Nothing for a stream that is closed meanwhile."""
        future = self.job.watch()
        late = math.inf if self._timeout is None else time.monotonic() + self._timeout
        while not self._over.is_set():
            has_ended = future.done()
            left = max(0.0, late - time.monotonic())
            piece, is_last = self._read(0.0 if has_ended else min(READ_SECONDS, left))
            if piece or is_last or has_ended:
                return piece, is_last or has_ended
            if not left:
                raise self._late("wrote nothing")
        return "", False

    def _late(self, did: str) -> ResultTimeoutError:
        why = self.job.why_waiting()
        text = f"job {self.job.id} {did} for {self._timeout:g} s and was cancelled"
        return ResultTimeoutError(text + (f": {why}" if why else ""))

    def _read(self, seconds: float) -> tuple[str, bool]:
        """The new text in Redis, and whether it is the last. Waits up to `seconds` for one entry."""
        key, block = text_key(self.job.id), max(1, round(1000 * seconds)) if seconds else None
        try:
            with redis_errors(self._session.settings.redis_url):
                found: Any = self._session.redis.xread({key: self._last}, count=PIECES, block=block)
        except ServiceUnavailableError:  # the future of the job bounds an outage
            self._over.wait(seconds)
            return "", False
        new, is_last = "", False
        for entry_id, fields in found[0][1] if found else ():
            self._last = entry_id.decode()
            new += _new_text(fields, len(self.text) + len(new))
            is_last = is_last or b"end" in fields
        return new, is_last

    def _rest(self, text: str) -> str:
        """The part of the result's text that no piece held."""
        if text.startswith(self.text):
            return text[len(self.text) :]
        log.warning("job %s was run again and wrote another text; its result alone counts", self.job.id)
        return ""

    def _cancel(self) -> None:
        try:
            self.job.cancel()
        except PipefleetError as error:
            log.debug("job %s cannot be cancelled: %s", self.job.id, error)


def _new_text(fields: dict[bytes, bytes], known: int) -> str:
    """The text of an entry behind the first `known` characters. Empty for an entry that leaves a gap, or that nobody wrote so."""
    try:
        at, text = int(fields[b"at"]), fields[b"text"].decode()
    except (KeyError, ValueError):
        return ""
    return text[known - at :] if 0 <= at <= known else ""


def written_text(output: Any) -> str:
    """The text of a result of a task that writes. Empty for a result without a text."""
    record = output[0] if isinstance(output, list) and output else output
    text = record.get("generated_text") if isinstance(record, dict) else None
    return text if isinstance(text, str) else ""
