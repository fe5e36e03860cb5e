"""The simulator keeps its books, repeats itself, and its bound is one; and our scaling keeps what its document promises."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet.errors import UsageError
from pipefleet_workers.fleet.simulation import command
from pipefleet_workers.fleet.simulation.bound import clairvoyant_cost, taut_string
from pipefleet_workers.fleet.simulation.pool import Result
from pipefleet_workers.fleet.simulation.run import BOUND, POLICIES, Scenario, compare, run_pool
from pipefleet_workers.fleet.simulation.traffic import DAY, Traffic, arrivals
from pipefleet_workers.fleet.simulation.workers import Hardware
from tests.docs import autoscaling

ROUGH = Hardware(spot_loss=1.0, hard=0.5, redelivery=900.0)


def once(policy: str, hardware: Hardware | None = None, seed: int = 1, **traffic: float) -> Result:
    scenario = Scenario(replace(Traffic(20), **traffic), hardware or Hardware())
    return run_pool(scenario, scenario.traffic, policy, seed)


@pytest.mark.parametrize("policy", POLICIES)
def test_work_is_never_lost_nor_made(policy: str) -> None:
    result = once(policy, ROUGH)
    assert result.carried + result.arrived == pytest.approx(result.done + result.outstanding, rel=1e-6)
    assert result.paid >= result.done > 0
    assert result.outstanding >= -1e-6


@pytest.mark.parametrize("policy", ["pipefleet", "KEDA, list length 20"])
def test_workers_of_a_replica_start_are_lost_and_end_together(policy: str) -> None:
    each = 8
    result = once(policy, replace(ROUGH, per_replica=each, on_demand=0.3))
    assert result.carried + result.arrived == pytest.approx(result.done + result.outstanding, rel=1e-6)
    assert result.starts % each == 0
    assert (result.trace[:, 1] % each == 0).all()
    assert result.trace[:, 1].max() > each


def test_large_replicas_cost_more_than_single_workers() -> None:
    single, large = (once("pipefleet", Hardware(spot_loss=0.0, reclaims=(), per_replica=each)) for each in (1, 16))
    assert large.paid > 1.1 * single.paid


def test_the_same_seed_is_the_same_day() -> None:
    first, again, other = (once("pipefleet", ROUGH, seed) for seed in (1, 1, 2))
    assert (first.paid, first.done, first.late, first.starts) == (again.paid, again.done, again.late, again.starts)
    assert np.array_equal(first.trace, again.trace)
    assert first.paid != other.paid


@pytest.mark.parametrize("changes", [{}, {"spread": 1.5}, {"jump": 4.0}, {"devices": 5000}, {"ramp": 600.0}])
def test_the_load_is_what_was_asked_for(changes: dict[str, float]) -> None:
    traffic = replace(Traffic(50, bursts=0, drift=0.0), **changes)
    came = arrivals(traffic, 1)
    mean = came.work.sum() / (traffic.days * DAY)
    assert mean == pytest.approx(traffic.devices * traffic.peak * 0.625, rel=0.03)
    assert (came.work >= 0).all()


def test_lost_workers_cost_and_hard_losses_delay() -> None:
    calm, rough = once("pipefleet", Hardware(spot_loss=0.0, reclaims=())), once("pipefleet", ROUGH)
    assert rough.starts > 2 * calm.starts
    assert rough.late > calm.late == 0


def test_on_demand_workers_are_not_lost_and_have_their_price() -> None:
    spot, mixed, steady = (once("pipefleet", replace(ROUGH, on_demand=share)) for share in (0.0, 0.5, 1.0))
    assert steady.starts < mixed.starts < spot.starts
    assert steady.price == pytest.approx(3.0 * steady.paid / 3600)
    assert spot.price < mixed.price < steady.price


@given(st.lists(st.floats(0, 100), min_size=3, max_size=40), st.integers(1, 8))
def test_a_taut_string_keeps_within_its_bounds_and_rises_least(work: list[float], wait: int) -> None:
    arrived = np.concatenate([[0.0], np.cumsum(work)])
    lower = np.concatenate([np.zeros(wait), arrived])
    upper = np.concatenate([arrived, np.full(wait, arrived[-1])])
    curve = taut_string(lower, upper)
    slack = 1e-6 * max(1.0, arrived[-1])
    assert (curve >= lower - slack).all()
    assert (curve <= upper + slack).all()
    for share in (0.0, 0.3, 1.0):
        other = share * lower + (1 - share) * upper
        assert rises(curve) <= rises(other) + slack


def rises(curve: np.ndarray) -> float:
    return float(np.maximum(np.diff(np.concatenate([[0.0], np.diff(curve)])), 0.0).sum())


def test_nobody_beats_the_clairvoyant() -> None:
    rows = compare(Scenario(Traffic(50)), list(POLICIES), [1])
    (bound,) = [row for row in rows if row.policy == BOUND]
    assert 1.0 < bound.cost < 1.05
    assert all(row.cost > bound.cost for row in rows if row is not bound)


def test_a_constant_load_needs_one_start_for_each_device() -> None:
    came = arrivals(Traffic(100, days=1, bursts=0, drift=0.0, ramp=1e9), 1)
    cost = clairvoyant_cost(came, slo=600.0, cold_start=180.0, warm=0.0)
    assert cost == pytest.approx(1.0 + 180.0 / DAY, rel=1e-3)


@pytest.mark.parametrize("name", ["pipefleet", "pipefleet through KEDA"])
@pytest.mark.parametrize("changes", [{}, {"jump": 4.0}, {"spread": 1.5}])
def test_our_scaling_keeps_what_the_document_promises(name: str, changes: dict[str, float]) -> None:
    scenario = Scenario(replace(Traffic(100), **changes))
    row = compare(scenario, [name], [4])[0]  # a seed that nothing was tuned on
    assert row.cost <= 1.08
    assert row.late <= 1e-4


def test_several_pools_add_up() -> None:
    scenario = Scenario(Traffic(60), pools=3)
    assert [part.devices for part in scenario.parts()] == [33, 16, 11]
    row = compare(scenario, ["pipefleet"], [1])[0]
    assert row.cost < 1.2
    assert row.late <= 1e-3


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    chosen = parser.parse_args(["simulate", *arguments])
    return int(chosen.run(chosen))


class TestCommand:
    def test_it_prints_a_row_for_each_policy(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("--devices", "5", "--seeds", "1", "--policy", "pipefleet", "--json") == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["policy"] for row in rows] == ["pipefleet", BOUND]

    def test_unknown_policies_are_refused(self) -> None:
        with pytest.raises(UsageError, match="there are: pipefleet"):
            run("--policy", "magic")


class TestDocument:
    def test_a_document_without_marks_is_refused(self) -> None:
        with pytest.raises(ValueError, match="mark"):
            autoscaling.filled("nothing")

    def test_the_document_has_the_marks_and_the_picture_of_a_day(self) -> None:
        text = autoscaling.DOCUMENT.read_text()
        assert all(f"<!-- generated: {name} -->" in text for name in autoscaling.PARTS)
        assert autoscaling.PICTURE.name in text
        picture = autoscaling.day_picture()
        assert picture.count("<polyline") == 3 * len(autoscaling.PICTURED)
        assert autoscaling.PICTURE.read_text() == picture, "run `python -m tests.docs.autoscaling`"
