"""The watchdog: a forward that does not return ends the process, since nothing inside it can."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipefleet_workers.exits import HUNG_FORWARD

LOOKS = 10
"""How often it looks within the time that a forward may take."""


class Watchdog:
    """Watches one thread's calls. `on_hang(code, reason)` is called once, from the watchdog's own thread."""

    def __init__(self, seconds: float, on_hang: Callable[[int, str], None]) -> None:
        self._seconds = seconds
        self._on_hang = on_hang
        self._started: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Cease to watch."""
        self._ended.set()

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def tick(self) -> None:
        """A sign of life from inside the call that is watched: its time starts anew."""
        if self._started is not None:
            self._started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._started = None

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds / LOOKS):
            started = self._started
            if started is not None and time.monotonic() - started > self._seconds:
                self._on_hang(HUNG_FORWARD, f"a forward has not returned within {self._seconds:.0f} s")
                return
