"""A trace of one worker: a JSON line for each piece of work of a stage, if `PIPEFLEET_WORKER_TRACE` names a file.

Lines are `{"stage", "thread", "start", "end", "count"}`, in seconds of the monotonic clock. `build` starts the `Tracer`; the engine
and the device time their work with `span`. Without the setting the trace costs almost nothing. If the file cannot be written, an
error is logged and the rest of the trace is dropped.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipefleet.service import Inbox, Service

log = logging.getLogger(__name__)
TOGETHER = 1000
"""At most so many lines are written at once."""
LAST_SECONDS = 5.0
"""Seconds that the end of the process waits for the last lines."""


class Tracer:
    """Writes spans from any thread through one writer thread, which runs from `start` on; `stop` writes the rest."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._lines: Inbox[str] = Inbox()
        self._service = Service("trace", self._write, wake=self._lines.wake)

    def start(self) -> None:
        """Begin to write; the rest is written at the end of the process."""
        if self._path is not None:
            self._service.start()
            atexit.register(self.stop, LAST_SECONDS)

    def stop(self, timeout: float | None = None) -> bool:
        """Write the remaining lines and end. Whether the writer ended within `timeout` seconds."""
        return self._service.stop(timeout)

    @contextmanager
    def span(self, stage: str, count: int) -> Iterator[None]:
        """Time the block as `count` pieces of work of `stage`."""
        if self._path is None:
            yield
            return
        start = time.monotonic()
        try:
            yield
        finally:
            fields = {"stage": stage, "thread": threading.current_thread().name, "start": start}
            self._lines.put(json.dumps({**fields, "end": time.monotonic(), "count": count}))

    def _write(self, stopping: threading.Event) -> None:
        assert self._path is not None
        try:
            with self._path.open("a") as file:
                while lines := self._lines.take(stopping, most=TOGETHER):
                    file.writelines(f"{line}\n" for line in lines)
                    file.flush()
        except OSError as error:
            log.error("cannot write the trace %s (%s); the rest of it is dropped", self._path, error.strerror)
            while self._lines.take(stopping, most=TOGETHER):  # or the lines would fill the memory
                pass
