"""The workers of a simulated pool: they start, become ready, are lost, are stopped.

`SimulatedPool` calls `Workers` in each step, once for spot workers and once for workers on demand. Every second of a worker's
existence is paid, its cold start included. No errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware of a simulated pool. Times in seconds, prices per device-hour."""

    cold_start: tuple[float, float] = (60.0, 300.0)
    """Seconds from a start to the first job, uniformly distributed between the two."""
    spot_loss: float = 0.03
    """Share of the spot workers that is reclaimed within an hour."""
    hard: float = 0.2
    """Share of the lost workers that end without notice; their work is delivered again."""
    redelivery: float = 30.0
    """Seconds until their work is delivered again."""
    reclaims: tuple[tuple[float, float], ...] = ((0.6, 0.3),)
    """Events of the last day: at which share of the day, which share of the spot workers is lost at once."""
    in_flight: float = 4.0
    """Device-seconds of work that a busy worker holds."""
    on_demand: float = 0.0
    """Share of the wanted workers that is bought on demand: never lost, at a price of its own."""
    spot_price: float = 1.0
    on_demand_price: float = 3.0
    per_replica: int = 1
    """Workers of a replica, such as a container with several GPUs: they start, are lost and are stopped together."""


class Workers:
    """Counts of one kind of worker, spot or on demand; inside in replicas, outside in workers."""

    def __init__(self, hardware: Hardware, steps: int, step: float, random: Any) -> None:
        self._low, self._high = (max(1, round(seconds / step)) for seconds in hardware.cold_start)
        self._due = [0] * (steps + self._high + 2)
        self._random = random
        self._each = hardware.per_replica
        self._ready = self._pending = self._starts = 0

    @property
    def ready(self) -> int:
        """The workers that do work."""
        return self._ready * self._each

    @property
    def starts(self) -> int:
        """The workers that were started so far."""
        return self._starts * self._each

    @property
    def total(self) -> int:
        """All paid workers."""
        return (self._ready + self._pending) * self._each

    def begin(self, now: int) -> None:
        """Let workers become ready whose cold start is over."""
        due, self._due[now] = self._due[now], 0
        self._ready += due
        self._pending -= due

    def lose(self, share: float) -> int:
        """Lose each ready replica with this probability; returns how many workers were lost."""
        if not self._ready or share <= 0:
            return 0
        lost = int(self._random.binomial(self._ready, share))
        self._ready -= lost
        return lost * self._each

    def resize(self, now: int, wanted: int) -> int:
        """Start or stop replicas until there are `wanted` workers; the last started stop first.

        Returns how many ready workers were stopped.
        """
        change = wanted // self._each - self._ready - self._pending
        if change > 0:
            self._start(now, change)
            return 0
        return self._stop(now, -change) * self._each

    def _start(self, now: int, count: int) -> None:
        self._starts += count
        self._pending += count
        delays = np.bincount(self._random.integers(self._low, self._high + 1, count))
        for delay in np.flatnonzero(delays):
            self._due[now + int(delay)] += int(delays[delay])

    def _stop(self, now: int, count: int) -> int:
        for at in range(now + self._high, now, -1):
            if not count or not self._pending:
                break
            gone = min(count, self._due[at])
            self._due[at] -= gone
            self._pending -= gone
            count -= gone
        stopped = min(count, self._ready)
        self._ready -= stopped
        return stopped
