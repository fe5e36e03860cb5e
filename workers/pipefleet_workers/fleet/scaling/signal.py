"""A pool's signal: its content in Redis, in device-seconds. The scaler's service and `top` call it.

    read_pool: lengths, sampled costs, totals of done work, live workers ─▶ Reading
    measure:   (memory, reading) ─▶ (memory, Signal), pure

Redis counts work in units of cost. One unit takes a worker

    seconds per unit of cost = workers * time / cost done,        measured while work waits

While work waits, every worker is busy, so this includes every delay of a worker. Before the first such measurement, the seconds of
forwards stand in for workers * time. `read_pool` raises redis-py's errors; `measure` raises nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipefleet.fleet.revisions import Held, Part
from pipefleet.foreign import mapping, number, whole
from pipefleet_workers.fleet.scaling.decide import GAP_SECONDS, Signal
from pipefleet_workers.fleet.scaling.messages import SAMPLE, Content, places, read_contents
from pipefleet_workers.observe.totals import Done, read_done

RATE_SECONDS = 300.0
"""Time constant of the average seconds per unit of cost."""
MEAN_SECONDS = 90.0
"""Time constant of the average cost of a waiting message, if costs are sampled."""
TRACE_SECONDS = 1e-3
"""The work of a message before anything was measured: enough for one worker, whose work is then measured."""
OLDEST_SECONDS = 30 * 86_400.0
"""Longest wait of a message that is believed."""
LONGEST_SECONDS = 6 * 3600.0
"""Most work that one worker can have done between two readings, a shard that lasted for many readings included. If the reported
cost is above this, a message lies about its cost; without this bound a unit of cost would seem to take no time for hours.
"""
STATES = ("queued", "leased", "delayed")


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a pool. `contents` by state and Redis key; `now` in seconds since 1970 (UTC)."""

    now: float
    contents: Mapping[str, Mapping[str, Content]]
    done: Done
    workers: int

    def count(self, state: str) -> int:
        """The exact number of messages in this state."""
        return sum(content.count for content in self.contents.get(state, {}).values())

    @property
    def oldest_age(self) -> float:
        """Seconds that the oldest message has waited, if messages carry their time."""
        times = [one.queued_at for one in self.contents.get("queued", {}).values() if one.queued_at is not None]
        return max(0.0, min(self.now - min(times), OLDEST_SECONDS)) if times else 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """The values that one reading keeps for the next; JSON by `to_json`."""

    at: float | None = None
    outstanding: float = 0.0
    """Cost of all messages of the pool."""
    waiting: int = 0
    done: Done = field(default_factory=Done)
    saturated: Done = field(default_factory=Done)
    """Cost done while work waited, and the seconds of workers for it, both fading."""
    device: Done = field(default_factory=Done)
    """Cost done, and the seconds of forwards, both fading."""
    served: Done = field(default_factory=Done)
    """Cost done, and the seconds of all workers, busy or not, both fading."""
    means: Mapping[str, float] = field(default_factory=dict)
    """Mean cost of a message, by key, if it is sampled."""
    pending: float = 0.0
    """Seconds of workers, while work waited, for work that has not ended: a shard may last for many readings."""
    workers: int = 0
    """Workers that were alive."""

    @property
    def seconds_per_cost(self) -> float | None:
        """Seconds that one worker takes for a unit of cost; None before anything was measured."""
        measured = next((one for one in (self.saturated, self.device) if one.cost > 0 and one.seconds > 0), None)
        return None if measured is None else measured.seconds / measured.cost

    def to_json(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(replace(self, means={})), "means": dict(self.means)}

    @classmethod
    def from_json(cls, value: Any) -> Memory:
        """The reverse of `to_json`. Raises ValueError or LookupError for any other value."""
        value = mapping(value)
        totals = (mapping(value[name]) for name in _TOTALS)
        done, saturated, device, served = (Done(number(one["cost"]), number(one["seconds"])) for one in totals)
        means = {str(key): number(mean) for key, mean in mapping(value["means"]).items()}
        at = None if value["at"] is None else number(value["at"])
        outstanding, waiting = number(value["outstanding"], most=OUTSTANDING), whole(value["waiting"])
        pending, workers = number(value.get("pending", 0.0)), whole(value.get("workers", 0))
        return cls(at, outstanding, waiting, done, saturated, device, served, means, pending, workers)


OUTSTANDING = 1e24
"""Most cost of all messages: as many messages as a server can hold, each of MOST_COST."""
_TOTALS = ("done", "saturated", "device", "served")


@dataclass(frozen=True, slots=True)
class Measured:
    """A signal, and its error."""

    signal: Signal
    seconds_per_cost: float | None
    error: float
    """Relative standard error of the outstanding cost; 0 if every message was read."""


def read_pool(redis: Any, part: Part, *, workers: int, now: float, source: random.Random | None = None) -> Reading:
    """Look at one revision of a pool, in three round trips that read at most SAMPLE messages of each list.

    Held and delayed messages of all revisions lie together; this revision's share of them gets their mean cost. Raises redis-py's
    errors.
    """
    wanted = places(*part.queues)
    contents: dict[str, dict[str, Content]] = {state: {} for state in STATES}
    read = read_contents(redis, wanted, source or random.Random(), now=now)
    for place, content in zip(wanted, read, strict=True):
        contents[place.state][place.key] = _own(content, place.state, part.held)
    return Reading(now, contents, read_done(redis, part.work_key), workers)


def _own(content: Content, state: str, held: Held | None) -> Content:
    """The part of this content that belongs to the revision."""
    if held is None or state == "queued":
        return content
    return replace(content, count=held.leased if state == "leased" else held.delayed)


def measure(memory: Memory, reading: Reading) -> tuple[Memory, Measured]:
    """The signal of a reading. Readings must come in order of time; after a long silence nothing counts as arrived."""
    elapsed = 0.0 if memory.at is None else reading.now - memory.at
    if not 0 < elapsed <= GAP_SECONDS:
        elapsed = 0.0
    means = _means(memory.means, reading, elapsed)
    costs = {state: _cost(reading.contents.get(state, {}), means) for state in STATES}
    outstanding = sum(costs.values())
    done = _done(memory, reading) if elapsed else 0.0
    learnt = _learnt(memory, reading, done, elapsed) if elapsed else memory
    waiting = reading.count("queued")
    seen = replace(learnt, at=reading.now, done=reading.done, workers=reading.workers)
    now = replace(seen, outstanding=outstanding, waiting=waiting, means=means)
    arrived = done + outstanding - memory.outstanding if elapsed else 0.0
    return now, _measured(now, reading, costs, arrived)


def _done(memory: Memory, reading: Reading) -> float:
    """The cost done since the last reading, bounded by the possible work."""
    done, scale = max(0.0, reading.done.cost - memory.done.cost), memory.seconds_per_cost
    return done if scale is None else min(done, LONGEST_SECONDS * max(1, memory.workers, reading.workers) / scale)


def _learnt(memory: Memory, reading: Reading, done: float, elapsed: float) -> Memory:
    """The memory with updated seconds per unit of cost, after `done` more units."""
    took = elapsed * min(memory.workers, reading.workers)  # a new worker has hardly begun
    seconds = max(0.0, reading.done.seconds - memory.done.seconds)
    served = _learn(memory.served, done, took, elapsed=elapsed)
    device = _learn(memory.device, done, seconds, elapsed=elapsed) if done or seconds else memory.device
    saturated, pending = memory.saturated, 0.0
    if memory.waiting and reading.count("queued"):
        pending = memory.pending + took
        if done and pending:
            saturated, pending = _learn(saturated, done, pending, elapsed=elapsed), 0.0
    saturated, device = _capped(saturated, served), _capped(device, served)
    return replace(memory, served=served, saturated=saturated, device=device, pending=pending)


def _capped(learnt: Done, served: Done) -> Done:
    """Lower the seconds per unit if the pool lately did more than they allow.

    Otherwise a pool that was slow for a while would stay too large for ever: no work would wait, and nothing would be measured.
    """
    if not served.cost or not served.seconds:
        return learnt
    return Done(learnt.cost, min(learnt.seconds, learnt.cost * served.seconds / served.cost))


def _measured(memory: Memory, reading: Reading, costs: Mapping[str, float], arrived: float) -> Measured:
    scale = memory.seconds_per_cost
    kinds = [one for contents in reading.contents.values() for one in contents.values()]
    signal = Signal(
        now=reading.now,
        queued=_seconds(costs["queued"] + costs["delayed"] - _later(reading, memory.means), scale),
        leased=_seconds(costs["leased"], scale),
        arrived=arrived * scale if scale is not None else 0.0,
        oldest_age=reading.oldest_age,
        ready=reading.workers,
        messages=sum(one.soon for one in kinds),
    )
    variance = sum((one.count * one.error) ** 2 for one in kinds)
    error = math.sqrt(variance) / memory.outstanding if memory.outstanding else 0.0
    return Measured(signal, scale, error)


def _seconds(cost: float, scale: float | None) -> float:
    return cost * scale if scale is not None else TRACE_SECONDS if cost else 0.0


def _later(reading: Reading, means: Mapping[str, float]) -> float:
    """The cost of delayed messages that are no work yet."""
    delayed = reading.contents.get("delayed", {}).items()
    return sum((content.count - content.soon) * means.get(key, content.mean) for key, content in delayed)


def _cost(contents: Mapping[str, Content], means: Mapping[str, float]) -> float:
    return sum(content.count * means.get(key, content.mean) for key, content in contents.items())


def _means(before: Mapping[str, float], reading: Reading, elapsed: float) -> dict[str, float]:
    """The mean costs of lists that are too long to be read whole: the sampling error of one reading must not look like arrivals."""
    means = {}
    for contents in reading.contents.values():
        for key, content in contents.items():
            if content.count > SAMPLE:
                keep = math.exp(-elapsed / MEAN_SECONDS) if elapsed and key in before else 0.0
                means[key] = keep * before.get(key, 0.0) + (1 - keep) * content.mean
    return means


def _learn(total: Done, cost: float, seconds: float, *, elapsed: float) -> Done:
    """A fading total: values that are RATE_SECONDS old weigh a third."""
    keep = math.exp(-elapsed / RATE_SECONDS)
    return Done(total.cost * keep + cost, total.seconds * keep + seconds)
