"""The least cost of any way to scale that knows every arrival beforehand: the cost of a clairvoyant.

Let A(t) be the work that has arrived by time t, and T the allowed wait. A scaler that is never late has done at least A(t - T) and
at most A(t) by time t. The devices in use are the slope of its curve between these two bounds. The total is fixed, and each rise of
the slope costs a cold start. The curve that is pulled taut between the bounds has the least total rise: where its slope is highest,
it runs from the upper bound to the lower bound, and no other curve is less steep on average between these two places. Fractions of
devices are allowed, and no device is lost, so the true optimum lies above.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipefleet_workers.fleet.simulation.traffic import Arrivals

BIN_SECONDS = 30.0


def clairvoyant_cost(arrivals: Arrivals, *, slo: float, cold_start: float, warm: float) -> float:
    """The least paid seconds for each second of work; `cold_start` is the mean."""
    per_bin = max(1, round(BIN_SECONDS / arrivals.step))
    work = arrivals.work[arrivals.measured(warm) :]
    arrived = np.concatenate([[0.0], np.cumsum(work)])[::per_bin]
    wait = round(slo / (per_bin * arrivals.step))
    lower = np.concatenate([np.zeros(wait), arrived])
    upper = np.concatenate([arrived, np.full(wait, arrived[-1])])
    lower[-1] = upper[-1]
    devices = np.diff(taut_string(lower, upper)) / (per_bin * arrivals.step)
    rises = np.maximum(np.diff(np.concatenate([[0.0], devices])), 0.0).sum()
    return float(1.0 + cold_start * rises / arrived[-1])


def taut_string(lower: Any, upper: Any) -> Any:
    """The shortest curve from `lower[0]` to `lower[-1]` between two rising curves with common ends."""
    curve = np.empty(len(lower))
    at, height, last = 0, float(lower[0]), len(lower) - 1
    curve[0] = height
    while at < last:
        end, slope = _segment(lower, upper, at, height)
        steps = np.arange(1, end - at + 1)
        curve[at + 1 : end + 1] = height + slope * steps
        at, height = end, float(curve[end])
    return curve


def _segment(lower: Any, upper: Any, at: int, height: float) -> tuple[int, float]:
    """The end and the slope of the straight piece of the taut string that begins here."""
    steepest, flattest = np.inf, -np.inf
    touch_upper = touch_lower = at
    for to in range(at + 1, len(lower)):
        high, low = (upper[to] - height) / (to - at), (lower[to] - height) / (to - at)
        if low > steepest:  # the lower bound rises above the line of sight: bend upwards at the upper bound
            return touch_upper, steepest
        if high < flattest:
            return touch_lower, flattest
        if high <= steepest:
            steepest, touch_upper = high, to
        if low >= flattest:
            flattest, touch_lower = low, to
    return len(lower) - 1, (lower[-1] - height) / (len(lower) - 1 - at)
