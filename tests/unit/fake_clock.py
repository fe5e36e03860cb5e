"""A clock that stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """Seconds since some moment, as `time.monotonic` gives them."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
