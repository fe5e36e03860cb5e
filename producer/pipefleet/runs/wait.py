"""Waiting for the end of a run, through outages of Redis and S3, and never beyond the caller's time-out.

`Run.wait` makes a `Waiter`; `Run.results` and `Run.failures` take its patience. An outage shows in the progress; after
PATIENCE_SECONDS ServiceUnavailableError is raised, after the time-out ResultTimeoutError.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pipefleet.arguments import timeout_of
from pipefleet.errors import PipefleetError, ResultTimeoutError, ServiceUnavailableError
from pipefleet.patience import PATIENCE_SECONDS, Patience, within
from pipefleet.runs.progress import RunProgress, Show, show_progress

POLL_SECONDS, POLL_FIRST, POLL_SHARE = 0.25, 0.02, 1 / 40
"""Seconds between two looks: at most, at first, and as a share of the wait so far. The end of a short run is noticed at once."""
LONGEST_PAUSE = 2.0
"""Most seconds between two looks at a service that is away: a person waits for the answer."""


@dataclass(slots=True)
class Waiter:
    """Waits for one run. `last` is its progress at the last look.

    `look` reads the progress. `check` raises if nobody goes on with the run, `planning` if its planning ended with an error.
    """

    last: RunProgress
    look: Callable[[], RunProgress]
    check: Callable[[RunProgress], None]
    planning: Callable[[], None]

    def wait(self, *, show: bool, timeout: float | None) -> RunProgress:
        """See `Run.wait`."""
        timeout, begin = timeout_of(timeout), time.monotonic()
        late = math.inf if timeout is None else begin + timeout
        with show_progress(enabled=show) as shown:
            patience = self.patience(lambda error: shown(self._away(error)))
            try:
                while not self._seen(patience, late, shown).ended:
                    self.check(self.last)
                    if time.monotonic() >= late:
                        raise TimeoutError
                    time.sleep(min(_pause(begin), max(0.0, late - time.monotonic())))
            except (TimeoutError, ServiceUnavailableError) as error:
                if time.monotonic() < late:
                    raise
                raise self._late(timeout or 0.0, error) from None
        return self.last

    def patience(self, told: Callable[[PipefleetError], object] = lambda error: None) -> Patience:
        """Patience for the calls of a caller that waits. An error that ended the planning is raised, not waited for."""

        def tell(error: PipefleetError) -> None:
            self.planning()
            told(error)

        return Patience(seconds=PATIENCE_SECONDS, longest=LONGEST_PAUSE, told=tell)

    def _seen(self, patience: Patience, late: float, shown: Show) -> RunProgress:
        self.last = patience.call(lambda: self._look_by(late), until=late)
        shown(self.last)
        return self.last

    def _look_by(self, late: float) -> RunProgress:
        """The progress. Raises TimeoutError at `late` (monotonic seconds), also while a service does not answer."""
        if late == math.inf:
            return self.look()
        return within(max(POLL_SECONDS, late - time.monotonic()), self.look)

    def _away(self, error: PipefleetError) -> RunProgress:
        """The last progress, with the outage as its field `waiting`."""
        return replace(self.last, waiting=f"waiting for a service: {error}")

    def _late(self, timeout: float, error: Exception) -> ResultTimeoutError:
        uri = self.last.uri
        away = f" ({error})" if isinstance(error, ServiceUnavailableError) else ""
        return ResultTimeoutError(
            f"the run at {uri} has not ended within {timeout:g} s{away}; it goes on, see `pipefleet status {uri}`"
        )


def _pause(begin: float) -> float:
    return min(POLL_SECONDS, max(POLL_FIRST, POLL_SHARE * (time.monotonic() - begin)))
