"""A simulated scaler's knowledge of a pool: counts, and costs with an error, measured by the service's own `measure`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipefleet_workers.fleet.scaling.messages import Content
from pipefleet_workers.fleet.scaling.signal import Memory, Reading, measure
from pipefleet_workers.observe.totals import Done

TICK_SECONDS = 15.0
"""How often a policy is asked: the period of Kubernetes' autoscaler."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """How well a policy knows the work of waiting jobs."""

    noise: float = 0.16
    """Relative error of one reading of the mean cost: the error of 64 sampled jobs of log-normal size with sigma 1."""
    counted: bool = False
    """True if every job costs 1, whatever its work."""


class Estimate:
    """Waiting and arrived work, as the service would measure them on this pool."""

    def __init__(self, knowledge: Knowledge, random: Any) -> None:
        self._knowledge, self._random = knowledge, random
        self._done = 0.0
        self._memory = Memory()

    def done(self, work: float, jobs: float) -> None:
        """Take in ended work."""
        self._done += jobs if self._knowledge.counted else work

    def read(self, now: float, work: float, jobs: float, *, workers: int) -> tuple[float, float]:
        """Device-seconds that wait, and device-seconds that arrived since the last reading."""
        error = float(np.exp(self._knowledge.noise * self._random.normal()))
        count = math.ceil(jobs - 1e-9)
        cost = (jobs if self._knowledge.counted else work * error) / max(1, count)
        contents = {"queued": {"": Content(count, cost)}}
        reading = Reading(now, contents, Done(self._done), workers)
        self._memory, measured = measure(self._memory, reading)
        return measured.signal.queued, measured.signal.arrived
