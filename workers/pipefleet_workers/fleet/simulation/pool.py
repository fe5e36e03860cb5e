"""One simulated pool over its days: a queue, workers that serve it in order of arrival, and a policy that sizes the fleet.

`run` calls `SimulatedPool.run`. Inside a step, work flows like a fluid: `n` ready workers do `n * step` device-seconds. Work is
never lost: it is done, or queued, or with a lost worker and comes back. No I/O, no errors; equal seeds give equal results.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pipefleet_workers.fleet.scaling.decide import whole_replicas
from pipefleet_workers.fleet.simulation.knowledge import TICK_SECONDS, Estimate, Knowledge
from pipefleet_workers.fleet.simulation.traffic import DAY, Arrivals
from pipefleet_workers.fleet.simulation.workers import Hardware, Workers

TRACE_STEPS = 60
"""Steps between two points of a picture."""


@dataclass(frozen=True, slots=True)
class View:
    """The knowledge of a policy at a tick: work in device-seconds (as estimated), jobs as counts."""

    now: float
    queued: float
    leased: float
    arrived: float
    queued_jobs: float
    leased_jobs: float
    oldest_age: float
    ready: int
    replicas: int


class Policy(Protocol):
    """A way to scale. `replicas` is called every TICK_SECONDS, in order of time."""

    def replicas(self, view: View) -> int:
        """The number of workers that there should be."""


@dataclass(frozen=True, slots=True)
class Result:
    """The totals of a pool over the time that counts. Work and `paid` in device-seconds; waits in seconds."""

    arrived: float
    done: float
    outstanding: float
    carried: float
    """Work that was there already when this time began."""
    paid: float
    price: float
    late: float
    """Share of the work that waited longer than the allowed wait."""
    median_wait: float
    p95_wait: float
    starts: int
    trace: Any
    """Every TRACE_STEPS steps: load, workers paid, age of the oldest job."""

    @property
    def cost(self) -> float:
        """Paid seconds for each second of work done."""
        return self.paid / self.done if self.done else 0.0


@dataclass(slots=True)
class _Account:
    """The sums over the time that counts."""

    carried: float
    starts: int
    paid: float = 0.0
    price: float = 0.0
    done: float = 0.0
    trace: list[tuple[float, float, float]] = field(default_factory=list)


class SimulatedPool:
    """One run. The pool has at most `maximum` workers; `knowledge` sets how well its policy knows the work of waiting jobs."""

    def __init__(
        self, arrivals: Arrivals, hardware: Hardware, policy: Policy, *, seed: int, maximum: int, knowledge: Knowledge
    ) -> None:
        self._arrivals, self._hardware, self._policy = arrivals, hardware, policy
        self._steps, self._step = len(arrivals.work), arrivals.step
        self._random = np.random.default_rng([seed, 2])
        self._estimate = Estimate(knowledge, np.random.default_rng([seed, 3]))
        self._maximum = maximum
        self._spot, self._steady = (Workers(hardware, self._steps, self._step, self._random) for _ in range(2))
        self._work: list[float] = arrivals.work.tolist()
        self._counts: list[float] = arrivals.jobs.tolist()
        self._account = _Account(0.0, 0)
        self._queue: deque[list[float]] = deque()
        self._away: deque[tuple[int, list[list[float]]]] = deque()
        self._waits = np.zeros(int(self._steps) + 1)
        self._queued = self._jobs = self._away_work = self._busy = self._wasted = 0.0

    def run(self, *, slo: float, warm: float) -> Result:
        """Simulate to the end; the first `warm` seconds do not count. Call it once."""
        first, tick = self._arrivals.measured(warm), max(1, round(TICK_SECONDS / self._step))
        reclaims = self._reclaims()
        for now in range(self._steps):
            if now == first:
                self._account = _Account(self._outstanding, self._spot.starts + self._steady.starts)
                self._waits[:] = 0.0
            self._arrive(now)
            self._change(now, reclaims.get(now, 0.0))
            self._serve(now)
            self._pay(*(self._tick(now) if now % tick == 0 else (0, 0)))
            if now % TRACE_STEPS == 0:
                self._account.trace.append(self._snapshot(now))
        return self._result(first, slo)

    def _pay(self, stopped_spot: int, stopped_steady: int) -> None:
        """Pay one step, and the time that stopped workers still need for their work."""
        account, hardware = self._account, self._hardware
        spot = self._spot.total * self._step + stopped_spot * hardware.in_flight
        steady = self._steady.total * self._step + stopped_steady * hardware.in_flight
        account.paid += spot + steady
        account.price += (spot * hardware.spot_price + steady * hardware.on_demand_price) / 3600

    def _snapshot(self, now: int) -> tuple[float, float, float]:
        oldest = (now - self._queue[0][0]) * self._step if self._queue else 0.0
        recent = self._work[max(0, now - TRACE_STEPS) : now + 1]
        return sum(recent) / len(recent) / self._step, self._spot.total + self._steady.total, oldest

    def _result(self, first: int, slo: float) -> Result:
        late, median, p95 = self._lateness(slo)
        account = self._account
        return Result(
            arrived=float(self._arrivals.work[first:].sum()),
            done=account.done,
            outstanding=self._outstanding,
            carried=account.carried,
            paid=account.paid,
            price=account.price,
            late=late,
            median_wait=median,
            p95_wait=p95,
            starts=self._spot.starts + self._steady.starts - account.starts,
            trace=np.array(account.trace),
        )

    @property
    def _outstanding(self) -> float:
        return self._queued + self._away_work

    def _reclaims(self) -> dict[int, float]:
        last = (self._steps * self._step) - DAY
        return {round((last + at * DAY) / self._step): share for at, share in self._hardware.reclaims}

    def _arrive(self, now: int) -> None:
        work, jobs = self._work[now], self._counts[now]
        if work > 0:
            self._queue.append([now, work, jobs])
            self._queued += work
            self._jobs += jobs
        while self._away and self._away[0][0] <= now:
            _, cohorts = self._away.popleft()
            self._queue.extendleft(reversed(cohorts))
            amount = sum(cohort[1] for cohort in cohorts)
            self._queued += amount
            self._away_work -= amount
            self._jobs += sum(cohort[2] for cohort in cohorts)

    def _change(self, now: int, reclaim: float) -> None:
        """Workers become ready or are lost.

        If lost without notice, their work is away for a while, and half of it is done twice.
        """
        self._spot.begin(now)
        self._steady.begin(now)
        lost = self._spot.lose(self._hardware.spot_loss * self._step / 3600) + self._spot.lose(reclaim)
        each = self._hardware.per_replica
        hard = int(self._random.binomial(lost // each, self._hardware.hard)) * each if lost else 0
        if hard:
            held = self._take(min(hard * self._hardware.in_flight, self._queued))
            amount = sum(cohort[1] for cohort in held)
            self._wasted += amount / 2
            self._away_work += amount
            self._away.append((now + round(self._hardware.redelivery / self._step), held))

    def _serve(self, now: int) -> None:
        """Do one step of the ready workers' work."""
        capacity = (self._spot.ready + self._steady.ready) * self._step
        lost = min(self._wasted, capacity)
        self._wasted -= lost
        done = jobs = 0.0
        for since, work, count in self._take(min(capacity - lost, self._queued)):
            self._waits[now - int(since)] += work
            done += work
            jobs += count
        self._estimate.done(done, jobs)
        self._busy = done / self._step
        self._account.done += done

    def _take(self, amount: float) -> list[list[float]]:
        """Remove this much work from the head of the queue."""
        taken: list[list[float]] = []
        left = amount
        while left > 1e-9 and self._queue:
            head = self._queue[0]
            part = min(left, head[1])
            jobs = head[2] * part / head[1]
            taken.append([head[0], part, jobs])
            left -= part
            self._queued -= part
            self._jobs -= jobs
            if part >= head[1]:
                self._queue.popleft()
            else:
                head[1] -= part
                head[2] -= jobs
        return taken

    def _tick(self, now: int) -> tuple[int, int]:
        """Ask the policy. Returns the numbers of ready workers that were stopped: spot, and on demand."""
        each = self._hardware.per_replica
        wanted = whole_replicas(max(self._policy.replicas(self._view(now)), 0), each=each, most=self._maximum)
        steady = round(wanted // each * self._hardware.on_demand) * each
        return self._spot.resize(now, wanted - steady), self._steady.resize(now, steady)

    def _view(self, now: int) -> View:
        held = self._busy * self._hardware.in_flight
        queued, jobs = max(0.0, self._queued), max(0.0, self._jobs)
        size = queued / jobs if jobs > 0 else 1.0
        time, ready = (now + 1) * self._step, self._spot.ready + self._steady.ready
        away = self._away_work / (size or 1.0)
        waiting, arrived = self._estimate.read(time, queued + self._away_work, jobs + away, workers=ready)
        return View(
            now=time,
            queued=waiting,
            leased=held,
            arrived=arrived,
            queued_jobs=jobs,
            leased_jobs=held / size if size > 0 else 0.0,
            oldest_age=(now - self._queue[0][0]) * self._step if self._queue else 0.0,
            ready=ready,
            replicas=self._spot.total + self._steady.total,
        )

    def _lateness(self, slo: float) -> tuple[float, float, float]:
        total = self._waits.sum()
        if total <= 0:
            return 0.0, 0.0, 0.0
        share = np.cumsum(self._waits) / total
        still = np.array([cohort[1] for cohort in self._queue if (self._steps - cohort[0]) * self._step > slo]).sum()
        beyond = self._waits[int(slo / self._step) + 1 :].sum()
        median, p95 = (float(np.searchsorted(share, part) * self._step) for part in (0.5, 0.95))
        return float((beyond + still) / (total + still)), median, p95
