"""The callbacks of a client's futures: they run on a thread of their own, so that none of them holds up those who wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pipefleet.forking import renew_after_fork
from pipefleet.service import Inbox, Service

log = logging.getLogger(__name__)


class Callbacks:
    """Runs functions one after another, in the order they came, on a daemon thread that begins with the first. Thread-safe."""

    _waiting: Inbox[Callable[[], object]]

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)
        self._service = Service("pipefleet-callbacks", self._call_each, wake=lambda: self._waiting.wake())

    def run(self, function: Callable[[], object]) -> None:
        """Have `function` called soon, also after `stop`; what it raises is logged. Never waits."""
        self._waiting.put(function)
        self.start()

    def start(self) -> None:
        """Begin to call."""
        self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Let the thread end after what has been given so far. Whether that took at most `timeout` seconds."""
        return self._service.stop(timeout)

    def after_fork(self) -> None:
        """What waits in the parent is called there."""
        self._waiting = Inbox()

    def _call_each(self, stopping: threading.Event) -> None:
        for function in self._waiting.each(stopping):
            try:
                function()
            except BaseException:  # SystemExit too: the thread is everybody's
                log.exception("a callback of a job failed")
