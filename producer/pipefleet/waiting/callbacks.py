"""The thread that runs the callbacks of a client's futures, so that no callback delays threads that wait for results.

`JobFuture` hands functions in. Their errors are logged and go nowhere else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pipefleet.forking import renew_after_fork
from pipefleet.service import Inbox, Service

log = logging.getLogger(__name__)


class Callbacks:
    """Runs functions one after another, in the order of `run`, on a daemon thread that starts with the first. Thread-safe."""

    _waiting: Inbox[Callable[[], object]]

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)
        self._service = Service("pipefleet-callbacks", self._call_each, wake=lambda: self._waiting.wake())

    def run(self, function: Callable[[], object]) -> None:
        """Call `function` soon on the thread, also after `stop`; log its error. Never waits."""
        self._waiting.put(function)
        self.start()

    def start(self) -> None:
        """Begin to call."""
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Let the thread end after the functions given so far. Returns whether that took at most `timeout` seconds."""
        return self._service.stop(timeout)

    def after_fork(self) -> None:
        """Start empty in the child: the parent runs the functions that wait in the parent."""
        self._waiting = Inbox()

    def _call_each(self, stopping: threading.Event) -> None:
        for function in self._waiting.each(stopping):
            try:
                function()
            except BaseException:  # SystemExit too: all callbacks need this thread
                log.exception("a callback of a job failed")
