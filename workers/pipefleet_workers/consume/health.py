"""Whether the services a worker needs are there: asked when one failed, so that an outage is told from one bad object."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable

from pipefleet.errors import PipefleetError
from pipefleet.patience import pause

log = logging.getLogger(__name__)
FIRST, LONGEST = 0.5, 15.0
"""Seconds between two looks at a service that is away: at most these, at least half, doubled each time."""


class Health:
    """Knows whether the services answer. Thread-safe. `probe` raises PipefleetError while one of them does not."""

    def __init__(self, probe: Callable[[], None]) -> None:
        self._probe = probe
        self._well = threading.Event()
        self._well.set()
        self._asking = threading.Lock()

    @property
    def well(self) -> bool:
        """What was last known."""
        return self._well.is_set()

    def check(self) -> bool:
        """Ask now. When the answer is no, a thread goes on asking until it is yes."""
        with self._asking:
            if not self.well:
                return False
            error = self._error()
            if error is None:
                return True
            log.warning("waiting for a service: %s", error)
            self._well.clear()
        threading.Thread(target=self._wait_for_it, name="health", daemon=True).start()
        return False

    def wait(self, seconds: float) -> bool:
        """Wait until the services answer, or `seconds`; whether they do."""
        return self._well.wait(seconds)

    def _wait_for_it(self) -> None:
        never = threading.Event()
        for attempt in itertools.count():
            never.wait(pause(attempt, first=FIRST, longest=LONGEST))
            if self._error() is None:
                break
        log.warning("the services answer again")
        self._well.set()

    def _error(self) -> PipefleetError | None:
        try:
            self._probe()
        except PipefleetError as error:
            return error
        return None
