"""A simulated scaler's knowledge of a pool: counts of jobs, and costs with an error.

`pool` passes the true work to `Estimate`, and gets the measured work, by the same `measure` as the scaler's service. No errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipefleet_workers.fleet.scaling.messages import Content
from pipefleet_workers.fleet.scaling.signal import Memory, Reading, measure
from pipefleet_workers.observe.totals import Done

TICK_SECONDS = 15.0
"""Seconds between two questions to a policy: the period of Kubernetes' autoscaler."""


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
        """Take in the work and the number of jobs that ended."""
        self._done += jobs if self._knowledge.counted else work

    def read(self, now: float, work: float, jobs: float, *, workers: int) -> tuple[float, float]:
        """The measured device-seconds of waiting work, and of the work that arrived since the last reading.

        `work` and `jobs` are the true work and the true number of jobs that wait.
        """
        error = float(np.exp(self._knowledge.noise * self._random.normal()))
        count = math.ceil(jobs - 1e-9)
        cost = (jobs if self._knowledge.counted else work * error) / max(1, count)
        contents = {"queued": {"": Content(count, cost)}}
        reading = Reading(now, contents, Done(self._done), workers)
        self._memory, measured = measure(self._memory, reading)
        return measured.signal.queued, measured.signal.arrived
