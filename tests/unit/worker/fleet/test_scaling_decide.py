"""Properties of the scaling decision: bounds, never 0 while there is work, monotone, steady, to zero when idle."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipefleet_workers.fleet.scaling.decide import (
    HOLD_SECONDS,
    Decision,
    ScalingLimits,
    Signal,
    State,
    decide,
    whole_replicas,
)

LIMITS = ScalingLimits(min=0, max=1000, wait_slo=600.0)
work = st.floats(0, 1e7, allow_nan=False)
signals = st.builds(
    Signal,
    now=st.just(0.0),
    queued=work,
    leased=work,
    arrived=st.floats(-1e6, 1e7, allow_nan=False),
    oldest_age=st.floats(0, 1e5),
    ready=st.integers(0, 2000),
)
histories = st.lists(signals, min_size=1, max_size=30)
ranges = st.tuples(st.integers(0, 50), st.integers(1, 2000)).map(lambda pair: (min(pair), max(*pair, 1)))


def follow(
    history: list[Signal], limits: ScalingLimits = LIMITS, state: State | None = None
) -> tuple[State, list[Decision]]:
    """The decisions on readings 15 s apart."""
    state, decisions = state or State(), []
    begin = 0.0 if state.at is None else state.at + 15.0
    for index, signal in enumerate(history):
        state, decision = decide(state, replace(signal, now=begin + 15.0 * index), limits=limits)
        decisions.append(decision)
    return state, decisions


def steady(seconds: float, load: float, workers: int, backlog: float = 0.0) -> tuple[list[int], float]:
    """A pool whose workers follow at once, under a constant load: its sizes, every 15 s, and the backlog at the end."""
    state, sizes = State(), []
    for index in range(int(seconds / 15)):
        backlog = max(0.0, backlog + (load - workers) * 15.0)
        signal = Signal(index * 15.0, backlog, min(load, workers), arrived=load * 15.0, ready=workers)
        state, decision = decide(state, signal, limits=LIMITS)
        workers = decision.desired
        sizes.append(workers)
    return sizes, backlog


@given(histories, ranges)
def test_the_pool_stays_within_its_bounds(history: list[Signal], bounds: tuple[int, int]) -> None:
    limits = ScalingLimits(*bounds, wait_slo=600.0)
    assert all(bounds[0] <= one.desired <= bounds[1] for one in follow(history, limits)[1])


@given(histories)
def test_while_there_is_work_there_is_a_worker(history: list[Signal]) -> None:
    for signal, decision in zip(history, follow(history)[1], strict=True):
        if signal.queued > 0 or signal.leased > 0:
            assert decision.desired >= 1


@given(histories, signals, work, st.booleans())
def test_more_work_never_means_fewer_workers(history: list[Signal], last: Signal, more: float, leased: bool) -> None:
    state, _ = follow(history)
    name = "leased" if leased else "queued"
    larger = replace(last, **{name: getattr(last, name) + more})
    _, (less,) = follow([last], state=state)
    _, (greater,) = follow([larger], state=state)
    assert greater.desired >= less.desired


@given(histories, signals)
def test_what_is_remembered_survives_json(history: list[Signal], last: Signal) -> None:
    state, _ = follow(history)
    restored = State.from_json(json.loads(json.dumps(state.to_json())))
    assert follow([last], state=restored) == follow([last], state=state)
    assert len(json.dumps(state.to_json())) < 4096


@given(st.floats(0.5, 400.0))
def test_under_a_constant_load_the_pool_settles(load: float) -> None:
    sizes, backlog = steady(4 * 3600, load, workers=0)
    settled = sizes[len(sizes) // 2 :]
    assert backlog <= 0.5 * LIMITS.wait_slo * max(load, 1.0)
    assert max(settled) - min(settled) <= max(1.0, 0.05 * load)
    changes = sum(before != after for before, after in itertools.pairwise(settled))
    assert changes <= len(settled) / 10


def test_an_idle_pool_goes_to_zero_after_the_hold_and_not_before() -> None:
    state, _ = follow([Signal(0.0, 600.0, 10.0, arrived=60.0, ready=4)] * 20)
    idle = [Signal(0.0, 0.0, 0.0, arrived=0.0, ready=4)] * 25
    decisions = follow(idle, state=state)[1]
    held = int(HOLD_SECONDS / 15)
    assert all(one.desired >= 1 for one in decisions[:held])
    assert all(one.desired == 0 for one in decisions[held + 1 :])


def test_a_lease_alone_keeps_the_last_worker() -> None:
    state, _ = follow([Signal(0.0, 0.0, 5.0, arrived=0.0, ready=1)] * 200)
    assert state.workers == 1


def test_a_dip_does_not_shrink_the_pool() -> None:
    busy = Signal(0.0, 6000.0, 100.0, arrived=1500.0, ready=100)
    state, before = follow([busy] * 60)
    _, during = follow([replace(busy, queued=0.0, leased=0.0, arrived=0.0)] * 10, state=state)
    assert min(one.desired for one in during) >= 0.95 * before[-1].desired


def test_a_burst_is_worked_off_in_time_and_not_taken_for_a_load() -> None:
    state, _ = follow([Signal(0.0, 300.0, 5.0, arrived=75.0, ready=5)] * 60)
    state, (burst,) = follow([Signal(0.0, 48_300.0, 5.0, arrived=48_075.0, ready=5)], state=state)
    assert 48_000 / LIMITS.wait_slo < burst.desired < 48_000 / 300
    assert burst.load < 6.0


def test_a_scaler_that_lost_its_memory_takes_what_runs_for_what_is_needed() -> None:
    signal = Signal(1e9, 100.0, 50.0, arrived=0.0, ready=40)
    assert decide(State(), signal, limits=LIMITS)[1].desired >= 40
    old = State(at=0.0, level=3.0, workers=3)
    assert decide(old, signal, limits=LIMITS)[1].desired >= 40


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_only_work_counts_not_how_it_is_cut_into_jobs(factor: float) -> None:
    fine = [Signal(0.0, 900.0, 30.0, arrived=300.0, ready=20)] * 40
    assert follow(fine)[1][-1].desired == pytest.approx(20, abs=2)
    scaled = [replace(one, queued=one.queued * factor, leased=one.leased * factor) for one in fine]
    assert (
        abs(follow(scaled)[1][-1].desired - 20) <= 10
    )  # a wrong cost of the backlog bends the pool, it does not break it


@pytest.mark.parametrize(
    ("workers", "each", "least", "most", "expected"),
    [
        (0, 4, 0, 20, 0),
        (1, 4, 0, 20, 4),
        (5, 4, 0, 20, 8),
        (20, 4, 0, 20, 20),
        (21, 4, 0, 22, 20),  # a sixth replica would be 24
        (1, 4, 0, 2, 4),  # there is no smaller one
        (5, 4, 5, 6, 8),
        (7, 1, 0, 9, 7),
    ],
)
def test_workers_come_in_whole_replicas(workers: int, each: int, least: int, most: int, expected: int) -> None:
    assert whole_replicas(workers, each=each, least=least, most=most) == expected
