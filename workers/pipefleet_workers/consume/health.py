"""Whether the services that a worker needs are there. It asks when a service failed, to tell an outage from one bad object.

    well     the services answer: the failure is the fault of the object
    away     a service does not answer: all jobs wait, and stay here
    barred   S3 answers, and refuses this worker: its jobs go back, since other workers may be allowed, and it takes none

The consumer and the store ask; watchers hear when the worker becomes barred, and when it is no longer barred.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from pipefleet.errors import AccessDeniedError, PipefleetError, ServiceUnavailableError
from pipefleet.patience import pause
from pipefleet.printable import printable
from pipefleet.service import Service
from pipefleet.storage.store import renew_credentials, renewals
from pipefleet_workers.storage.store import BarredError

log = logging.getLogger(__name__)
FIRST, LONGEST = 0.5, 15.0
"""Seconds between two looks at a service that is away: the first pause and the longest. Pauses double, with jitter."""
MOST = 400
"""Characters of a reason in a message."""


class Health:
    """Knows whether the services answer. Thread-safe. `probe` raises while a service does not answer.

    An error of the probe that is not retryable bars the worker: its keys, its clock or its bucket are wrong. `sleep` waits the
    given seconds between two looks; the default wait ends at `stop`.

    A look that finds a service away starts a thread. The thread goes on asking until the services answer, or until `stop`.
    """

    def __init__(
        self,
        probe: Callable[[], None],
        *,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe = probe
        self._sleep = sleep
        self._clock = clock
        self._changed = threading.Condition()
        self._well = True
        self._barred: str | None = None
        self._told: type | None = None
        self._released = False
        self._asking = threading.Lock()
        self._service = Service("health", self._wait_for_it)
        self._stopped = False
        self._asked = float("-inf")
        """When the last look began that found all services well."""
        self.watchers: list[Callable[[str | None], None]] = []
        """Callbacks of any thread: with the reason when this worker becomes barred, with None when it is no longer barred."""

    @property
    def well(self) -> bool:
        """The last known answer."""
        return self._well

    @property
    def barred(self) -> str | None:
        """Why S3 refuses this worker; None while it does not."""
        return self._barred

    def check(self) -> bool:
        """Ask now. When a service does not answer, a thread keeps asking until it does."""
        with self._asking:
            if not self.well:
                return False
            error = self._look()
        self._follow(error)
        return error is None

    def is_away(self) -> bool:
        """Ask now whether a service does not answer."""
        return not self.check()

    def accuse(self, error: AccessDeniedError, seen: int) -> None:
        """Judge a refusal of S3. Returns if the worker is well otherwise: S3 then refuses only the one object.

        `seen` is the value of `renewals()` when the request got its credentials. Raises BarredError if S3 refuses this worker, and
        ServiceUnavailableError if no answer comes, or if a repeated request would have other credentials now.
        """
        came, found = self._clock(), None
        with self._asking:
            if self.well and self._asked < came:
                found = self._look()
        self._follow(found)
        if self._barred is not None:
            raise BarredError(self._barred)
        if not self.well or seen != renewals():
            raise ServiceUnavailableError(str(error))

    def wait(self) -> bool:
        """Wait until the services answer, this worker is barred, or `release` is called. Returns whether the services answer."""
        with self._changed:
            self._changed.wait_for(lambda: self._well or self._barred is not None or self._released)
            return self._well

    def release(self) -> None:
        """Let no thread wait from now on: the worker drains."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def start(self) -> None:
        """Go on asking where a service is away."""
        with self._changed:
            self._stopped = False
            if not self._well:
                self._service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Stop asking, and release all waiting threads; the last answer stays. Whether the thread ended in `timeout` seconds."""
        self.release()
        with self._changed:
            self._stopped = True
        return self._service.stop(timeout)

    def _look(self) -> Exception | None:
        """Ask now, and note a bad answer. The caller holds the lock and calls `_follow` with the result."""
        began = self._clock()
        error = self._error()
        if error is None:
            self._asked = began
        else:
            self._well = False
        return error

    def _follow(self, error: Exception | None) -> None:
        """After a look: tell the watchers of `error`, and go on asking in a thread."""
        if error is None:
            return
        self._say(error)
        with self._changed:
            if not self._stopped:
                self._service.start()

    def _say(self, error: Exception | None) -> None:
        is_final = isinstance(error, PipefleetError) and not error.retryable
        barred = printable(str(error), MOST) if is_final else None
        changed = barred != self._barred
        is_news = changed or type(error) is not self._told
        self._told = type(error)
        if error is not None and is_news:
            what = "takes no jobs and looks again every few seconds" if is_final else "waiting for a service"
            log.warning("%s: %s", what, printable(str(error), MOST))
        with self._changed:
            self._barred = barred
            self._well = error is None
            self._changed.notify_all()
        for watcher in self.watchers if changed else ():
            watcher(barred)

    def _wait_for_it(self, stopping: threading.Event) -> None:
        sleep = self._sleep or stopping.wait
        for attempt in itertools.count():
            sleep(pause(attempt, first=FIRST, longest=LONGEST))
            if stopping.is_set():
                return
            error = self._error()
            if error is None:
                break
            self._say(error)
        log.warning("the services answer again")
        stopping.set()  # from here on, a look that finds a service away starts a new thread
        self._say(None)

    def _error(self) -> Exception | None:
        """The error of the probe.

        After a refusal it asks again with credentials that are read anew, since they may have been replaced.
        """
        error = self._tried()
        if isinstance(error, AccessDeniedError):
            renew_credentials()
            error = self._tried()
        return error

    def _tried(self) -> Exception | None:
        try:
            self._probe()
        except PipefleetError as error:
            return error
        except Exception as error:  # an unforeseen kind; the thread that asks must keep asking
            log.exception("asking the services failed")
            return error
        return None
