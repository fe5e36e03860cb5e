"""Learns the cost of a batch on this device from the batches themselves: seconds = base + per_cost * padded cost.

The warm-up and the lanes add each batch; `facts` announces the fit, which `top` shows. Least squares with exponential
forgetting: every batch weighs 2 % less than the next, so the fit follows a device that gets slower or faster. A simulated device
takes a `ServiceTime` from its setting; a wrong text raises UsageError.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from pipefleet.errors import UsageError

KEEP = 0.98


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """Seconds of one batch: `base + per_cost * cost`, with the padded cost of the batch."""

    base: float
    per_cost: float

    @classmethod
    def parse(cls, text: str) -> ServiceTime:
        """The value of a text such as `"0.005,0.0002"`. Raises UsageError unless the text is two numbers that are not negative."""
        try:
            base, per_cost = (float(part) for part in text.split(","))
        except ValueError:
            base = per_cost = -1.0
        if base < 0 or per_cost < 0:
            raise UsageError(f"a simulated device is given as BASE,PER_COST in seconds, not {text[:40]!r}")
        return cls(base, per_cost)

    def of(self, cost: float) -> float:
        """Seconds for a batch of this padded cost."""
        return self.base + self.per_cost * cost


class ServiceFit:
    """A fit that is updated with each batch. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, cost: float, seconds: float) -> None:
        """Take in one batch: its padded cost, and its device seconds."""
        with self._lock:
            self._weight = self._weight * KEEP + 1.0
            self._x = self._x * KEEP + cost
            self._y = self._y * KEEP + seconds
            self._xx = self._xx * KEEP + cost * cost
            self._xy = self._xy * KEEP + cost * seconds

    def current(self) -> ServiceTime | None:
        """The fit so far, neither part negative; None before the first batch."""
        with self._lock:
            if not self._weight or not self._x:
                return None
            mean_x, mean_y = self._x / self._weight, self._y / self._weight
            variance = self._xx / self._weight - mean_x * mean_x
            if variance <= 1e-9 * mean_x * mean_x:  # all batches had one cost: assume that the base is 0
                return ServiceTime(0.0, mean_y / mean_x)
            slope = (self._xy / self._weight - mean_x * mean_y) / variance
            slope = min(max(slope, 0.0), mean_y / mean_x)
            return ServiceTime(max(0.0, mean_y - slope * mean_x), slope)  # rounding may leave -1e-18
