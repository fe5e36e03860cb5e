"""Whether the services a worker needs are there: asked when one failed, so that an outage is told from one bad object."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from pipefleet.errors import PipefleetError
from pipefleet.patience import pause

log = logging.getLogger(__name__)
FIRST, LONGEST = 0.5, 15.0
"""Seconds between two looks at a service that is away: at most these, at least half, doubled each time."""


class Health:
    """Knows whether the services answer. Thread-safe. `probe` raises PipefleetError while one of them does not.

    `sleep` waits that many seconds between two looks.
    """

    def __init__(self, probe: Callable[[], None], *, sleep: Callable[[float], object] = time.sleep) -> None:
        self._probe = probe
        self._sleep = sleep
        self._changed = threading.Condition()
        self._well = True
        self._released = False
        self._asking = threading.Lock()

    @property
    def well(self) -> bool:
        """What was last known."""
        return self._well

    def check(self) -> bool:
        """Ask now. When the answer is no, a thread goes on asking until it is yes."""
        with self._asking:
            if not self.well:
                return False
            error = self._error()
            if error is None:
                return True
            log.warning("waiting for a service: %s", error)
            self._well = False
        threading.Thread(target=self._wait_for_it, name="health", daemon=True).start()
        return False

    def wait(self) -> bool:
        """Wait until the services answer, or until `release`; whether they do."""
        with self._changed:
            self._changed.wait_for(lambda: self._well or self._released)
            return self._well

    def release(self) -> None:
        """Nobody waits from now on: the worker drains."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def _wait_for_it(self) -> None:
        for attempt in itertools.count():
            self._sleep(pause(attempt, first=FIRST, longest=LONGEST))
            if self._error() is None:
                break
        log.warning("the services answer again")
        with self._changed:
            self._well = True
            self._changed.notify_all()

    def _error(self) -> Exception | None:
        try:
            self._probe()
        except PipefleetError as error:
            return error
        except Exception as error:
            log.exception("asking for the services failed")
            return error
        return None
