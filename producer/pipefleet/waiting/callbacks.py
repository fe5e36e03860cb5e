"""The callbacks of a client's futures: they run on a thread of their own, so that none of them holds up those who wait."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from pipefleet.forking import renew_after_fork

log = logging.getLogger(__name__)


class Callbacks:
    """Runs functions one after another, in the order they came, on a daemon thread that begins with the first. Thread-safe."""

    _lock: threading.Lock
    _thread: threading.Thread | None
    _waiting: queue.SimpleQueue[Callable[[], object] | None]

    def __init__(self) -> None:
        self._start_afresh()
        renew_after_fork(self)

    def run(self, function: Callable[[], object]) -> None:
        """Have `function` called soon; what it raises is logged. Never waits."""
        with self._lock:
            self._waiting.put(function)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_call_each, args=(self._waiting,), name="pipefleet-callbacks", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """Let the thread end after what has been given so far. A later `run` begins another."""
        with self._lock:
            if self._thread is not None:
                self._waiting.put(None)
                self._thread, self._waiting = None, queue.SimpleQueue()

    def after_fork(self) -> None:
        """What waits in the parent is called there."""
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._thread, self._waiting = None, queue.SimpleQueue()


def _call_each(waiting: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (function := waiting.get()) is not None:
        try:
            function()
        except BaseException:  # SystemExit too: the thread is everybody's, and no other begins after it
            log.exception("a callback of a job failed")
