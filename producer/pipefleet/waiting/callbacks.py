"""The thread that runs the callbacks of a client's futures, so that no callback delays threads that wait for results.

`JobFuture` hands functions in. Their errors are logged and go nowhere else.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from pipefleet.forking import renew_after_fork

log = logging.getLogger(__name__)


class Callbacks:
    """Runs functions one after another, in the order of `run`, on a daemon thread that starts with the first. Thread-safe."""

    _lock: threading.Lock
    _thread: threading.Thread | None
    _waiting: queue.SimpleQueue[Callable[[], object] | None]

    def __init__(self) -> None:
        self._start_afresh()
        renew_after_fork(self)

    def run(self, function: Callable[[], object]) -> None:
        """Call `function` soon on the thread; log its error. Never waits."""
        with self._lock:
            self._waiting.put(function)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_call_each, args=(self._waiting,), name="pipefleet-callbacks", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """Let the thread end after the functions given so far. A later `run` starts another thread."""
        with self._lock:
            if self._thread is not None:
                self._waiting.put(None)
                self._thread, self._waiting = None, queue.SimpleQueue()

    def after_fork(self) -> None:
        """Start empty in the child: the parent runs the functions that wait in the parent."""
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._thread, self._waiting = None, queue.SimpleQueue()


def _call_each(waiting: queue.SimpleQueue[Callable[[], object] | None]) -> None:
    while (function := waiting.get()) is not None:
        try:
            function()
        except (
            BaseException
        ):  # SystemExit too: all callbacks need this thread, and no other thread would start after it
            log.exception("a callback of a job failed")
