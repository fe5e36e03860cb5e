"""The arrivals of a simulated pool: a daily cycle that differs a little from day to day, noise, bursts of bulk work, odd job sizes.

`run` calls `arrivals` with a `Traffic` and a seed. Arrivals are cohorts: for each step, the device-seconds of the work that came,
and the number of its jobs. No errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DAY = 86_400.0
EXACT_JOBS = 3_000_000
"""Up to this number each job's size is drawn; above, a cohort's sum comes from a distribution with the same mean and variance."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """The load of one pool of `devices` devices. Times in seconds."""

    devices: int
    days: int = 2
    step: float = 5.0
    peak: float = 0.8
    """Load at the height of the day, as a share of the devices; at night it is a quarter of this."""
    job_seconds: float = 2.0
    spread: float = 1.0
    """Sigma of the log-normal sizes of jobs; 1.5 is a heavy tail."""
    bursts: int = 3
    """Bulk jobs a day."""
    burst_seconds: float = 240.0
    """Work of a burst, in seconds of the whole pool."""
    drift: float = 0.05
    """Noise of the load over a quarter of an hour, and of the height of one day against another."""
    phase: float = 0.0
    """Share of a day by which the cycle is shifted."""
    ramp: float | None = None
    """If set, office hours: the load rises from night to day within so many seconds, and falls likewise."""
    jump: float = 1.0
    """From the middle of the last day, for 15 % of a day, jobs are so many times larger and so many times fewer."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Work in device-seconds and number of jobs, for each step."""

    work: Any
    jobs: Any
    step: float

    def measured(self, warm: float) -> int:
        """The first step after `warm` seconds."""
        return round(warm / self.step)


def arrivals(traffic: Traffic, seed: int) -> Arrivals:
    """The arrivals of every step; the same for the same seed."""
    random = np.random.default_rng([seed, 1])
    steps = round(traffic.days * DAY / traffic.step)
    times = (np.arange(steps) + 0.5) * traffic.step
    size = np.full(steps, traffic.job_seconds)
    middle = (traffic.days - 0.5) * DAY
    size[(times >= middle) & (times < middle + 0.15 * DAY)] *= traffic.jump
    jobs = random.poisson(_load(traffic, times, random) * traffic.step / size)
    work = _cohorts(jobs, size, traffic.spread, random)
    for at in _burst_steps(traffic, steps, random):
        amount = traffic.devices * traffic.burst_seconds * random.uniform(0.5, 1.5)
        work[at] += amount
        jobs[at] += max(1, round(amount / size[at]))
    return Arrivals(work, jobs.astype(float), traffic.step)


def _load(traffic: Traffic, times: Any, random: Any) -> Any:
    """Busy devices over time: a daily cycle between a quarter of the peak and the peak, times slow noise."""
    wave = np.cos(2 * np.pi * (times / DAY + traffic.phase))
    if traffic.ramp is not None:
        wave = np.clip(wave * DAY / (np.pi * traffic.ramp), -1.0, 1.0)
    wave = 0.625 - 0.375 * wave
    heights = random.lognormal(0.0, traffic.drift, traffic.days)
    noise = _slow_noise(len(times), traffic.step / 900.0, random) * traffic.drift
    return traffic.devices * traffic.peak * wave * heights[(times // DAY).astype(int)] * np.exp(noise)


def _slow_noise(steps: int, rate: float, random: Any) -> Any:
    """Gaussian noise of variance 1 with a memory of 1/rate steps: drawn every half memory, straight lines between."""
    apart = max(1, round(0.5 / rate))
    knots = random.normal(size=steps // apart + 2)
    for index in range(1, len(knots)):
        knots[index] = 0.6 * knots[index - 1] + 0.8 * knots[index]
    return np.interp(np.arange(steps), np.arange(len(knots)) * apart, knots)


def _cohorts(jobs: Any, size: Any, spread: float, random: Any) -> Any:
    """Work of each cohort: the sum of its jobs' log-normal sizes, whose mean is `size`."""
    variance = np.expm1(spread * spread)
    if jobs.sum() <= EXACT_JOBS:
        each = random.lognormal(-spread * spread / 2, spread, int(jobs.sum())) * np.repeat(size, jobs)
        return np.bincount(np.repeat(np.arange(len(jobs)), jobs), weights=each, minlength=len(jobs))
    shape = np.maximum(jobs, 1) / variance
    return np.where(jobs > 0, random.gamma(shape, size * variance), 0.0)


def _burst_steps(traffic: Traffic, steps: int, random: Any) -> list[int]:
    per_day = steps // traffic.days
    return [
        day * per_day + int(at) for day in range(traffic.days) for at in random.integers(0, per_day, traffic.bursts)
    ]
