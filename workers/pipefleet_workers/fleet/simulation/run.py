"""Runs of whole fleets: every policy with the same arrivals and the same seeds, summed over pools, averaged over seeds.

`command` calls `compare`, and passes its rows to `report`. An unknown policy raises KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipefleet_workers.fleet.scaling.decide import ScalingLimits
from pipefleet_workers.fleet.simulation.bound import clairvoyant_cost
from pipefleet_workers.fleet.simulation.knowledge import Knowledge
from pipefleet_workers.fleet.simulation.policies import (
    BacklogPerInstance,
    ListLength,
    OngoingRequests,
    Ours,
)
from pipefleet_workers.fleet.simulation.pool import Policy, Result, SimulatedPool
from pipefleet_workers.fleet.simulation.traffic import DAY, Arrivals, Traffic, arrivals
from pipefleet_workers.fleet.simulation.workers import Hardware

ROOM = 2
"""Most workers of a pool for each device of its size."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A fleet of equal or different pools. All days before the last only warm up."""

    traffic: Traffic
    hardware: Hardware = field(default_factory=Hardware)
    knowledge: Knowledge = field(default_factory=Knowledge)
    slo: float = 600.0
    pools: int = 1
    """The devices are split over so many pools of different sizes, with shifted days."""

    def parts(self) -> list[Traffic]:
        """The traffic of each pool: devices in the proportion 1/1, 1/2, 1/3 …, none below 1."""
        shares = [1 / (rank + 1) for rank in range(self.pools)]
        sizes = [max(1, round(self.traffic.devices * share / sum(shares))) for share in shares]
        return [
            replace(self.traffic, devices=size, phase=rank / self.pools if rank else 0.0)
            for rank, size in enumerate(sizes)
        ]

    @property
    def warm(self) -> float:
        """Seconds before the day that counts."""
        return (self.traffic.days - 1) * DAY


@dataclass(frozen=True, slots=True)
class Row:
    """One policy on one scenario: means over seeds; `worst_late` is the `late` of the worst seed."""

    policy: str
    devices: int
    cost: float
    late: float
    worst_late: float
    median_wait: float
    p95_wait: float
    starts: float
    price: float


Maker = Callable[[Scenario, int], Policy]


def _ours(scenario: Scenario, devices: int) -> Ours:
    low, high = scenario.hardware.cold_start
    return Ours(ScalingLimits(0, ROOM * devices, scenario.slo, cold_start=(low + high) / 2))


def _through_hpa(scenario: Scenario, devices: int) -> Ours:
    policy = _ours(scenario, devices)
    policy.through_hpa = True
    return policy


def _jobs_in_time(scenario: Scenario) -> float:
    """Jobs that one worker does within half of the allowed wait."""
    return max(1.0, scenario.slo / 2 / scenario.traffic.job_seconds)


POLICIES: dict[str, Maker] = {
    "pipefleet": _ours,
    "pipefleet through KEDA": _through_hpa,
    "KEDA, list length 20": lambda scenario, devices: ListLength(20),
    "KEDA, list length of the allowed wait": lambda scenario, devices: ListLength(2 * _jobs_in_time(scenario)),
    "backlog per instance 5": lambda scenario, devices: BacklogPerInstance(5),
    "backlog per instance, tuned": lambda scenario, devices: BacklogPerInstance(_jobs_in_time(scenario)),
    "requests per replica 2": lambda scenario, devices: OngoingRequests(),
}
BOUND = "clairvoyant bound"


def run_pool(scenario: Scenario, traffic: Traffic, name: str, seed: int) -> Result:
    """One pool under one policy. Raises KeyError for an unknown policy."""
    policy = POLICIES[name](scenario, traffic.devices)
    return _run(scenario, traffic, arrivals(traffic, seed), policy, seed)


def compare(scenario: Scenario, names: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """A row for each policy, then the bound that no policy can beat."""
    results: dict[str, list[list[Result]]] = {name: [] for name in names}
    bounds: list[float] = []
    for seed in seeds:
        came = [(traffic, arrivals(traffic, seed + 1000 * rank)) for rank, traffic in enumerate(scenario.parts())]
        for name in names:
            makers = [(traffic, one, POLICIES[name](scenario, traffic.devices)) for traffic, one in came]
            results[name].append([_run(scenario, traffic, one, policy, seed) for traffic, one, policy in makers])
        bounds.append(_bound(scenario, [one for _, one in came]))
    devices = scenario.traffic.devices
    rows = [_row(name, devices, of_seeds) for name, of_seeds in results.items()]
    return [*rows, Row(BOUND, devices, _mean(bounds), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]


def _run(scenario: Scenario, traffic: Traffic, came: Arrivals, policy: Policy, seed: int) -> Result:
    pool = SimulatedPool(
        came, scenario.hardware, policy, seed=seed, maximum=ROOM * traffic.devices, knowledge=scenario.knowledge
    )
    return pool.run(slo=scenario.slo, warm=scenario.warm)


def _bound(scenario: Scenario, came: Sequence[Arrivals]) -> float:
    cold = sum(scenario.hardware.cold_start) / 2
    weights = [float(one.work[one.measured(scenario.warm) :].sum()) for one in came]
    costs = [clairvoyant_cost(one, slo=scenario.slo, cold_start=cold, warm=scenario.warm) for one in came]
    return sum(cost * weight for cost, weight in zip(costs, weights, strict=True)) / sum(weights)


def _row(name: str, devices: int, of_seeds: Sequence[Sequence[Result]]) -> Row:
    """The row of one policy. Pools are summed; lateness and waits are weighted by the work done."""
    late = [_weighted(pools, [one.late for one in pools]) for pools in of_seeds]
    return Row(
        policy=name,
        devices=devices,
        cost=_mean([sum(one.paid for one in pools) / sum(one.done for one in pools) for pools in of_seeds]),
        late=_mean(late),
        worst_late=max(late),
        median_wait=_mean([_weighted(pools, [one.median_wait for one in pools]) for pools in of_seeds]),
        p95_wait=_mean([_weighted(pools, [one.p95_wait for one in pools]) for pools in of_seeds]),
        starts=_mean([sum(one.starts for one in pools) for pools in of_seeds]),
        price=_mean([sum(one.price for one in pools) for pools in of_seeds]),
    )


def _weighted(pools: Sequence[Result], values: Sequence[float]) -> float:
    total = sum(one.done for one in pools)
    return sum(one.done * value for one, value in zip(pools, values, strict=True)) / total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
