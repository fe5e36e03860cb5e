"""The bounds on what is inside a worker, and the sink that collects a job's outcomes."""

from __future__ import annotations

import threading

import pytest

from pipefleet.contract import JobItem
from pipefleet.records import JobFailure
from pipefleet_workers.admission import Budget
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import JobContext, Outcome, Work

SECONDS = 30.0


def passes(budget: Budget, items: int, size: int) -> threading.Event:
    """An event that is set once this much was acquired, by a thread of its own."""
    done = threading.Event()

    def acquire() -> None:
        budget.acquire(items, size)
        done.set()

    threading.Thread(target=acquire, daemon=True).start()
    return done


@pytest.mark.parametrize(("items", "size"), [(2, 1), (1, 60)])
def test_the_budget_holds_back_what_does_not_fit_until_room_is_given_back(items: int, size: int) -> None:
    budget = Budget(items=3, size=100)
    budget.acquire(2, 50)
    waiting = passes(budget, items, size)
    assert not waiting.wait(0.1)
    budget.release(2, 50)
    assert waiting.wait(SECONDS)


def test_what_is_larger_than_the_budget_passes_alone() -> None:
    budget = Budget(items=3, size=100)
    assert passes(budget, 1, 5000).wait(SECONDS)
    other = passes(budget, 1, 1)
    assert not other.wait(0.1)
    budget.release(1, 5000)
    assert other.wait(SECONDS)


def test_a_closed_budget_lets_everybody_pass() -> None:
    budget = Budget(items=1, size=1)
    budget.acquire(1, 1)
    waiting = [passes(budget, 1, 1) for _ in range(3)]
    budget.close()
    assert all(one.wait(SECONDS) for one in waiting)


def outcome(position: int, output: object = None, failure: JobFailure | None = None) -> Outcome:
    context = JobContext("job", None, {}, 3, None, Outcomes(range(1)))
    return Outcome(Work(context, position, JobItem(str(position), ""), {}, 1), output, failure)


def test_outcomes_come_in_order_and_the_first_of_an_item_is_final() -> None:
    sink = Outcomes(range(3))
    for one in (outcome(2, "c"), outcome(0, "a"), outcome(2, "other"), outcome(1, failure=JobFailure("x", "y", "z"))):
        sink.deliver(one)
    assert sink.complete
    assert [one.output for one in sink.in_order()] == ["a", None, "c"]


def test_wait_gives_each_new_outcome_once() -> None:
    sink = Outcomes(range(3))
    sink.deliver(outcome(1))
    assert [one.work.position for one in sink.wait(0.0)] == [1]
    assert sink.wait(0.0) == []
    for position in (0, 2):
        sink.deliver(outcome(position))
    assert [one.work.position for one in sink.wait(SECONDS)] == [0, 2]


def test_abandoning_wakes_the_waiting_thread() -> None:
    sink, woken = Outcomes(range(1)), threading.Event()

    def wait() -> None:
        sink.wait(SECONDS * 10)
        woken.set()

    threading.Thread(target=wait, daemon=True).start()
    sink.abandon(RuntimeError("going away"))
    assert woken.wait(SECONDS)
    assert sink.abandoned
    assert not sink.complete
