"""Medians, spreads, ratios and the limit, computed from records."""

from __future__ import annotations

import pytest

from tests.benchmarks import summary
from tests.benchmarks.contenders import BATCHED, CELERY, HAND, HANDS, LITSERVE, ONE_BY_ONE, SYSTEM
from tests.unit.benchmarks.records import record, run


def test_median_and_spread() -> None:
    found = summary.rows(record({HAND: [run(80.0), run(60.0), run(70.0)]}))[HAND]
    assert (found.rate.median, found.rate.lowest, found.rate.highest) == pytest.approx((70.0, 60.0, 80.0))
    assert found.cpu_ms.median == pytest.approx(10.0)
    assert found.few is False


@pytest.mark.parametrize(("one", "several", "best"), [(70.0, 80.0, HANDS), (80.0, 70.0, HAND)])
def test_the_limit_is_the_better_hand_loop(one: float, several: float, best: str) -> None:
    found = summary.rows(record({HAND: [run(one)], HANDS: [run(several)], SYSTEM: [run(40.0)]}))
    assert summary.limit(found) == best
    assert found[SYSTEM].to_limit == pytest.approx(0.5)
    assert summary.ratios(found)["limit"] == pytest.approx(0.5)


def test_a_hand_loop_with_wrong_outputs_is_no_limit() -> None:
    found = summary.rows(record({HAND: [run(70.0)], HANDS: [run(900.0), run(900.0, agreement=0.9)]}))
    assert summary.limit(found) == HAND
    assert not found[HANDS].counts


def test_ratios_are_to_contenders_that_count() -> None:
    rows = {ONE_BY_ONE: [run(10.0)], BATCHED: [run(20.0)], CELERY: [run(90.0, agreement=0.5)], SYSTEM: [run(40.0)]}
    found = summary.rows(record(rows | {LITSERVE: "not installed"}))
    assert summary.ratios(found) == pytest.approx({"one-by-one": 4.0, "batched": 2.0})
    assert summary.best_peer(found) is None
    assert summary.ratios(summary.rows(record({SYSTEM: [run(40.0, agreement=0.5)], HAND: [run(50.0)]}))) == {}


def test_cpu_time_beyond_the_limit_is_split() -> None:
    own = run(40.0) | {"cpu": {"client": 0.2, "worker": 1.5, "redis": 0.3}}
    found = summary.rows(record({HAND: [run(50.0)], SYSTEM: [own]}))
    assert summary.beyond_limit_us(found) == pytest.approx((10_000.0, 5_000.0))


def test_fewer_items_than_usual_are_marked() -> None:
    found = summary.rows(record({HAND: [run(50.0), run(50.0, items=99)], HANDS: [run(50.0)]}))
    assert (found[HAND].few, found[HANDS].few) == (True, False)


def test_a_record_without_runs_gives_no_rows() -> None:
    assert summary.rows(record({HAND: [], SYSTEM: "no"})) == {}
    assert summary.limit({}) is None
    assert summary.beyond_limit_us({}) is None
