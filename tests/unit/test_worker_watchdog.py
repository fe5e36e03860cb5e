"""The watchdog and the fit of the service time: what ends a process, and what a batch is said to cost."""

from __future__ import annotations

import threading
import time

import pytest

from pipefleet.errors import UsageError
from pipefleet_workers.exits import HUNG_FORWARD
from pipefleet_workers.service_fit import ServiceFit
from pipefleet_workers.simulated import ServiceTime
from pipefleet_workers.watchdog import Watchdog

DEADLINE = 30.0


def test_a_call_that_does_not_return_is_reported_once() -> None:
    hung = threading.Event()
    codes: list[int] = []

    def on_hang(code: int, reason: str) -> None:
        codes.append(code)
        hung.set()

    watchdog = Watchdog(0.2, on_hang)
    watchdog.start()
    with watchdog:
        assert hung.wait(DEADLINE)
    assert codes == [HUNG_FORWARD]


def test_ticks_keep_a_long_call_alive_and_idle_time_does_not_count() -> None:
    hung = threading.Event()
    watchdog = Watchdog(1.0, lambda code, reason: hung.set())
    watchdog.start()
    assert not hung.wait(1.3), "nothing was called"
    with watchdog:
        until = time.monotonic() + 2.0
        while time.monotonic() < until and not hung.is_set():
            watchdog.tick()
            hung.wait(0.05)
    watchdog.stop()
    assert not hung.is_set()


def test_the_fit_finds_base_and_slope() -> None:
    fit = ServiceFit()
    assert fit.current() is None
    for cost in (100, 400, 900, 1600, 2500) * 20:
        fit.add(cost, 0.01 + 0.0002 * cost)
    found = fit.current()
    assert found is not None
    assert found.base == pytest.approx(0.01, rel=1e-6)
    assert found.per_cost == pytest.approx(0.0002, rel=1e-6)


def test_the_fit_follows_a_device_that_gets_slower() -> None:
    fit = ServiceFit()
    for seconds in (0.0001, 0.0003):
        for cost in (100, 700, 2000) * 200:
            fit.add(cost, seconds * cost)
    found = fit.current()
    assert found is not None
    assert found.per_cost == pytest.approx(0.0003, rel=0.01)


def test_one_cost_only_still_gives_a_rate_and_never_a_negative_part() -> None:
    fit = ServiceFit()
    fit.add(500, 0.1)
    fit.add(500, 0.1)
    assert fit.current() == ServiceTime(0.0, pytest.approx(0.0002))
    for cost, seconds in ((100, 0.5), (1000, 0.1)) * 50:  # the longer batch is the faster one: noise
        fit.add(cost, seconds)
    found = fit.current()
    assert found is not None
    assert found.base >= 0
    assert found.per_cost >= 0


@pytest.mark.parametrize("text", ["", "1", "a,b", "-1,0", "1,2,3"])
def test_a_simulated_device_needs_two_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        ServiceTime.parse(text)
