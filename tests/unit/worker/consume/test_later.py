"""Deliveries for later, by a clock that a test moves."""

from __future__ import annotations

import threading

from pipefleet_workers.consume.later import Later
from tests.unit.worker.consume.fakes import FakeClock


def test_what_is_due_comes_in_the_order_of_its_time() -> None:
    clock = FakeClock()
    later: Later[str] = Later(clock)
    for value, seconds in (("c", 3.0), ("a", 1.0), ("b", 1.0), ("d", 9.0)):
        assert later.put(value, seconds)
    clock.now += 5.0
    assert later.take() == ["a", "b", "c"]


def test_who_waits_is_woken_by_something_earlier() -> None:
    later: Later[str] = Later(FakeClock())
    later.put("a year", 3.2e7)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.extend(later.take()), daemon=True)
    thread.start()
    later.put("now", 0.0)
    thread.join(20)
    assert found == ["now"]


def test_any_year_may_be_named() -> None:
    later: Later[str] = Later()
    later.put("the year 9999", 2.5e11)
    thread = threading.Thread(target=later.take, daemon=True)
    thread.start()
    later.put("now", 0.0)
    thread.join(20)
    assert not thread.is_alive()


def test_one_that_is_picked_does_not_come() -> None:
    clock = FakeClock()
    later: Later[str] = Later(clock)
    for value in ("a", "b", "c"):
        later.put(value, 1.0)
    assert later.pick(lambda value: value in "ac") == ["a", "c"]
    clock.now += 1.0
    assert later.take() == ["b"]


def test_closing_gives_everything_back_and_ends_who_waits() -> None:
    later: Later[str] = Later(FakeClock())
    later.put("b", 2.0)
    later.put("a", 1.0)
    thread = threading.Thread(target=later.take, daemon=True)
    thread.start()
    assert later.close() == ["a", "b"]
    thread.join(20)
    assert not thread.is_alive()
    assert not later.put("c", 1.0)
