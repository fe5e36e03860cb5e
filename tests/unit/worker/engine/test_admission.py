"""The bounds on what is inside a worker, and the sink that collects a job's outcomes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.contract.records import JobFailure
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.budget import Budget
from pipefleet_workers.items import JobContext, Outcome, Work

SECONDS = 30.0


def works(items: int, size: int = 0) -> list[Work]:
    """Items of `size` bytes together."""
    context = JobContext("job", None, {}, 9, None, Outcomes(range(1)))
    return [Work(context, index, JobItem(str(index), ""), {}, 0 if index else size) for index in range(items)]


def never() -> None:
    """No job is stopped, and nobody looks for signs of life."""


def passes(wait: Callable[[], object]) -> threading.Event:
    """An event that is set once a thread of its own has got through."""
    done = threading.Event()

    def go() -> None:
        wait()
        done.set()

    threading.Thread(target=go, daemon=True).start()
    return done


def enters(budget: Budget, items: Sequence[Work]) -> threading.Event:
    return passes(lambda: budget.enter(items, never))


@pytest.mark.parametrize(("items", "size"), [(2, 1), (1, 60)])
def test_the_budget_holds_back_what_does_not_fit_until_room_is_given_back(items: int, size: int) -> None:
    budget = Budget(items=3, size=100)
    inside = works(2, 50)
    assert budget.enter(inside, never)
    waiting = enters(budget, works(items, size))
    assert not waiting.wait(0.1)
    budget.leave(inside[0])
    assert waiting.wait(SECONDS)


def test_what_is_larger_than_the_budget_passes_alone() -> None:
    budget = Budget(items=3, size=100)
    large = works(1, 5000)
    assert enters(budget, large).wait(SECONDS)
    other = enters(budget, works(1, 1))
    assert not other.wait(0.1)
    budget.leave(large[0])
    assert other.wait(SECONDS)


def test_room_comes_back_once_however_often_an_item_leaves() -> None:
    budget = Budget(items=3, size=100)
    left, inside, never_in = *works(2, 60), works(1, 60)[0]
    budget.enter([left, inside], never)
    for one in (left, left, never_in, left):
        budget.leave(one)
    assert not budget.empty
    budget.leave(inside)
    assert budget.empty


def test_what_waits_hears_that_its_job_was_stopped_and_takes_no_room() -> None:
    budget, stopped = Budget(items=1, size=1), threading.Event()
    (inside,) = works(1)
    budget.enter([inside], never)
    found: list[bool] = []
    waiting = passes(lambda: found.append(budget.enter(works(1), stopped.is_set)))
    assert not waiting.wait(0.1)
    stopped.set()
    assert waiting.wait(SECONDS)
    assert found == [False]
    budget.leave(inside)
    assert budget.empty


def test_results_take_room_from_inputs_and_never_wait_for_them() -> None:
    """The device hands on what it has made although the inputs fill the budget: only that makes room."""
    budget = Budget(items=9, size=100)
    made, waiting = works(1, 60)[0], works(1, 40)[0]
    budget.enter([made, waiting], never)
    budget.hold([(made, 90)])
    budget.finish(made)
    budget.weigh(made, 80)
    entering = enters(budget, works(1, 30))
    assert not entering.wait(0.1)
    budget.leave(waiting)
    assert not entering.wait(0.1)  # 60 bytes of inputs and 80 of a result are inside
    budget.leave(made)
    assert entering.wait(SECONDS)


def test_outputs_wait_for_results_and_results_for_the_store_alone() -> None:
    budget = Budget(items=9, size=100)
    first, second, third, fourth = works(4)
    budget.hold([(first, 60)])
    waiting = passes(lambda: budget.hold([(second, 60)]))
    assert not waiting.wait(0.1)
    budget.finish(first)
    budget.weigh(first, 30)  # a result of half the size
    assert waiting.wait(SECONDS)
    budget.finish(second)
    budget.weigh(second, 5000)  # there it is already, so nobody may wait for room for it
    budget.leave(first)
    rest = [passes(lambda: budget.hold([(third, 1)])), passes(lambda: budget.finish(fourth))]
    assert not rest[0].wait(0.1)
    assert not rest[1].wait(0.1)
    budget.leave(second)
    assert all(one.wait(SECONDS) for one in rest)
    budget.leave(third)
    assert budget.empty


def test_a_closed_budget_lets_everybody_pass() -> None:
    budget = Budget(items=1, size=1)
    budget.enter(works(1, 1), never)
    waiting = [enters(budget, works(1, 1)) for _ in range(3)]
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
