"""`TextStream`: the text of a job, piece by piece, while a worker writes it.

    worker ─ XADD ─▶ text:<job> ─ XREAD ─▶ TextStream ─▶ pieces; at the end the rest of the job's result

`FleetPipeline.stream` makes it. The result of the job alone counts: a piece that was lost comes at the end, with the rest.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Generator, Iterator
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
    """The pieces of the text that one job writes. For one thread, or for one task of an event loop.

    The joined pieces are the text of `result()`. `close`, and the end of a `with` block, cancel a job that goes on.

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
        self._pieces = self._read_pieces()

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.to_thread(next, self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def result(self) -> Any:
        """The result of the job, as the pipeline call returns it. Reads the rest of the text first."""
        for _ in self:
            pass
        return self._output

    def close(self) -> None:
        """Read no more, and cancel the job unless it has ended."""
        self._pieces.close()
        if self._output is None:  # the generator may not have begun
            self._cancel()

    def _read_pieces(self) -> Generator[str]:
        ended = False
        try:
            while not ended:
                piece, ended = self._next_piece()
                if piece:
                    self.text += piece
                    yield piece
            self._output = self.job.result()
        finally:
            if self._output is None:
                self._cancel()
        rest = self._rest(written_text(self._output))
        if rest:
            self.text += rest
            yield rest

    def _next_piece(self) -> tuple[str, bool]:
        """The text that came since the last piece, and whether the job has ended."""
        future = self.job.watch()
        late = math.inf if self._timeout is None else time.monotonic() + self._timeout
        while True:
            has_ended = future.done()
            left = max(0.0, late - time.monotonic())
            piece, is_last = self._read(0.0 if has_ended else min(READ_SECONDS, left))
            if piece or is_last or has_ended:
                return piece, is_last or has_ended
            if not left:
                why = self.job.why_waiting()
                text = f"job {self.job.id} wrote nothing for {self._timeout:g} s and was cancelled"
                raise ResultTimeoutError(text + (f": {why}" if why else ""))

    def _read(self, seconds: float) -> tuple[str, bool]:
        """The new text in Redis, and whether it is the last. Waits up to `seconds` for one entry."""
        key, block = text_key(self.job.id), max(1, round(1000 * seconds)) if seconds else None
        try:
            with redis_errors(self._session.settings.redis_url):
                found: Any = self._session.redis.xread({key: self._last}, count=PIECES, block=block)
        except ServiceUnavailableError:  # the future of the job bounds an outage
            time.sleep(seconds)
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
