"""The latest fleet that a fleet file describes without a mistake, for clients and workers that live long and follow a roll-out.

`fleet()` looks at the file when it is asked, not before, and never fails once a fleet is known. Its counterpart
`pipefleet_workers.fleet.local.edits` tells `pipefleet up` of each settled edit once, mistakes included.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipefleet.errors import FleetFileError
from pipefleet.fleet.file import fingerprint, load_fleet
from pipefleet.fleet.pools import Fleet

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0
"""Seconds between two looks at the file."""


class LatestFleet:
    """A fleet file that may change. Thread-safe. Hub models may be unpinned in it: that is for the workers to refuse.

    `known`, if given, is the fleet until the file can be read.
    """

    def __init__(self, path: Path, *, known: Fleet | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._fleet = known
        self._seen: tuple[int, ...] = ()
        self._look_at = 0.0
        self._lock = threading.Lock()

    def fleet(self, *, at_once: bool = False) -> Fleet:
        """The fleet of the file, as of the last LOOK_SECONDS; with `at_once` as of now.

        A file that is wrong after a change, or gone, is passed over with a warning: the fleet stays as it was. Raises
        FleetFileError if the first read fails and no fleet is known.
        """
        with self._lock:
            now = self._clock()
            if self._fleet is None or at_once or now >= self._look_at:
                self._look_at = now + LOOK_SECONDS
                self._fleet = self._look(self._fleet)
            return self._fleet

    def _look(self, known: Fleet | None) -> Fleet:
        seen = fingerprint(self.path)
        if known is not None and seen == self._seen:
            return known
        self._seen = seen
        try:
            return load_fleet(self.path, allow_unpinned=True)
        except FleetFileError as error:
            if known is None:
                raise
            log.warning("the fleet stays as it was: %s", error)
            return known
