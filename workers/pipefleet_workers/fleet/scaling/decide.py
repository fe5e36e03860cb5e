"""How many workers a pool should have, as a pure function: no clock, no I/O. The service and the simulator call the same code.

    (state, signal, limits) ─▶ average of the load ─▶ correction by the backlog ─▶ hold and round ─▶ (state, decision)

All work is in device-seconds, so a load is a number of busy devices. The backlog is steered to a part of the wait that the pool
allows (`ScalingLimits.slack`) rather than to zero: then no device idles, and an average that is wrong by a few per cent moves the
backlog a little where it would otherwise waste devices.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipefleet.foreign import mapping, number, whole

LEVEL_SECONDS = 300.0
"""Time constant of the average load."""
SURGE = 2.0
"""A reading above this many times the load or the pool is a burst: the backlog shows it, and the average ignores it."""
REACH = 0.9
"""Share of the allowed wait within which a backlog is worked off, cold starts included."""
COLD_SHARE = 0.5
"""Share of a cold start that shortens this time: the ready workers go on during a cold start."""
SHORTEST = 60.0
"""Least seconds in which a backlog is worked off, however late it is; two cold starts if these are shorter."""
QUIET = 0.3
"""A backlog that differs from the wanted backlog by less than this share needs no correction."""
LEAN = 0.15
"""The share by which the pool goes below the load when there is no backlog at all."""
HOLD_SECONDS = 300.0
"""A pool shrinks only to the largest number wanted for this long; it goes to zero after being idle for as long."""
MOST_LOAD = 1e6
"""Most busy devices of a pool. No scaler writes a larger load to Redis, so a larger load is the work of another program."""
GAP_SECONDS = 120.0
"""After a longer silence a reading starts afresh, since the arrivals cannot be spread over the silence."""


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """Settings of a pool in the fleet file: bounds on the workers, seconds that a job may wait, seconds until a worker is ready."""

    min: int
    max: int
    wait_slo: float
    cold_start: float = 180.0
    slack: float = 0.1
    """The target wait of work that need not be first, as a share of `wait_slo`."""
    hold: float = HOLD_SECONDS
    """See HOLD_SECONDS."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One reading of a pool. Work in device-seconds, `now` in seconds since 1970 (UTC)."""

    now: float
    queued: float
    """Work that waits, of all priorities, delayed work that is due soon included."""
    leased: float
    """Work that workers hold."""
    arrived: float
    """Work that arrived since the last reading."""
    oldest_age: float = 0.0
    """Seconds that the oldest waiting job has waited; 0 if nothing waits or messages carry no time."""
    ready: int = 0
    """Workers that take work."""
    messages: float = math.inf
    """Number of messages of this work. One worker does one message, so more workers than messages cannot help with a backlog."""


@dataclass(frozen=True, slots=True)
class State:
    """The values that one decision keeps for the next; small, and JSON by `to_json`."""

    at: float | None = None
    level: float = 0.0
    workers: int = 0
    idle_since: float | None = None
    recent: tuple[tuple[float, float], ...] = ()
    """Time and number of workers wanted, for the last `ScalingLimits.hold` seconds."""

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "recent": [list(one) for one in self.recent]}

    @classmethod
    def from_json(cls, value: Any) -> State:
        """The reverse of `to_json`. Raises ValueError, LookupError or TypeError for any other value."""
        value = mapping(value)
        recent = tuple((number(time), number(wanted)) for time, wanted in value["recent"])
        at, idle = (None if value[name] is None else number(value[name]) for name in ("at", "idle_since"))
        return cls(at, number(value["level"], most=MOST_LOAD), whole(value["workers"]), idle, recent)


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of workers of the pool, and the values that led to it."""

    desired: int
    load: float
    """Average of the arriving work, in device-seconds a second: the number of devices that it keeps busy."""
    wanted: float
    """Workers wanted now, before holding, rounding and bounds."""


def decide(state: State, signal: Signal, *, limits: ScalingLimits) -> tuple[State, Decision]:
    """The next number of workers, within `limits`; at least 1 while there is work.

    Readings must come in order of time. More often than every minute is useful; more often than every 5 s is not.
    """
    state = _observe(state, signal)
    wanted = _wanted(state.level, signal, limits)
    state = _remember(state, signal, wanted, limits.hold)
    desired = min(max(_held(state, signal, wanted, limits.hold), limits.min), limits.max)
    return replace(state, workers=desired), Decision(desired, state.level, wanted)


def replacing(decision: Decision, *, barred: int, ready: int, most: int) -> Decision:
    """The decision, with substitutes for living workers that take no jobs since S3 refuses them; `most` workers in all.

    At most `ready` + 1 workers are replaced. If S3 refuses every worker, the one extra worker shows whether the workers themselves
    are at fault.
    """
    spare = min(barred, ready + 1) if decision.desired else 0
    return replace(decision, desired=min(decision.desired + spare, max(most, decision.desired)))


def whole_replicas(workers: int, *, each: int, least: int = 0, most: int) -> int:
    """The number of workers in whole replicas of `each`, which start and end together: rounded up, but within `most` workers.

    One replica, and those that `least` workers need, may exceed `most`, since there is no smaller number.
    """
    replicas = min(math.ceil(workers / each), max(1, most // each, math.ceil(least / each)))
    return replicas * each


def _observe(state: State, signal: Signal) -> State:
    """The state with the average updated by this reading. After a silence, the running workers count as the load."""
    elapsed = None if state.at is None else signal.now - state.at
    if elapsed is None or not 0 <= elapsed <= GAP_SECONDS:
        running = max(signal.ready, state.workers)
        recent = ((signal.now, float(running)),)
        return State(signal.now, max(state.level, float(signal.ready)), running, None, recent)
    rate = min(signal.arrived / elapsed if elapsed else state.level, SURGE * max(state.level, float(signal.ready), 1.0))
    level = state.level + (rate - state.level) * -math.expm1(-elapsed / LEVEL_SECONDS)
    return replace(state, at=signal.now, level=max(0.0, level))


def _wanted(load: float, signal: Signal, limits: ScalingLimits) -> float:
    """The wanted workers: the load, raised for a backlog above the wanted backlog, lowered for a backlog below it."""
    backlog = signal.queued + signal.leased
    aim = limits.slack * limits.wait_slo * load
    over = backlog - aim * (1 + QUIET)
    if over > 0:
        reach = REACH * limits.wait_slo - COLD_SHARE * limits.cold_start - signal.oldest_age / 2
        return load + min(over / max(min(SHORTEST, 2 * limits.cold_start), reach), signal.messages)
    under = aim * (1 - QUIET) - backlog
    return load * (1 - LEAN * under / aim) if under > 0 else load


def _remember(state: State, signal: Signal, wanted: float, hold: float) -> State:
    recent = [one for one in state.recent if signal.now - hold < one[0] <= signal.now]
    busy = signal.queued > 0 or signal.leased > 0
    idle_since = None if busy else signal.now if state.idle_since is None else state.idle_since
    return replace(state, recent=(*recent, (signal.now, wanted)), idle_since=idle_since)


def _held(state: State, signal: Signal, wanted: float, hold: float) -> int:
    """The whole number of workers. It rises at once, falls to the largest number wanted lately, and to 0 after a long idle time."""
    if state.idle_since is not None and signal.now - state.idle_since >= hold:
        return 0
    most = max(wanted for _, wanted in state.recent)
    up, down = math.ceil(wanted - 0.25), math.ceil(most - 0.25)
    chosen = up if up > state.workers else min(down, state.workers)
    return max(1, chosen) if state.idle_since is None or state.workers else chosen
