"""A trace of one worker: a JSON line for each piece of work of a stage, if `PIPEFLEET_WORKER_TRACE` names a file.

Lines are `{"stage", "thread", "start", "end", "count"}`, in seconds of the monotonic clock. Without the setting the trace costs
almost nothing. If the file cannot be written, the rest of the trace is dropped.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class Tracer:
    """Writes the spans of all threads through one writer thread."""

    def __init__(self, path: str) -> None:
        self._lines: queue.SimpleQueue[str | None] | None = None
        if path:
            self._lines = queue.SimpleQueue()
            writer = threading.Thread(target=self._write, args=(Path(path), self._lines), name="trace", daemon=True)
            writer.start()
            atexit.register(self._close, writer)

    @contextmanager
    def span(self, stage: str, count: int) -> Iterator[None]:
        """Time the block as `count` pieces of work of `stage`."""
        if self._lines is None:
            yield
            return
        start = time.monotonic()
        try:
            yield
        finally:
            fields = {"stage": stage, "thread": threading.current_thread().name, "start": start}
            self._lines.put(json.dumps({**fields, "end": time.monotonic(), "count": count}))

    @staticmethod
    def _write(path: Path, lines: queue.SimpleQueue[str | None]) -> None:
        try:
            with path.open("a") as file:
                while (line := lines.get()) is not None:
                    file.write(line + "\n")
                    if lines.empty():
                        file.flush()
        except OSError as error:
            log.error("cannot write the trace %s (%s); the rest of it is dropped", path, error.strerror)
            while lines.get() is not None:  # otherwise the lines would fill the memory
                pass

    def _close(self, writer: threading.Thread) -> None:
        if self._lines is not None:
            self._lines.put(None)
            writer.join(5.0)
