"""The gate: jobs beside each other, a suspect alone, and no order of calls in which both wait for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipefleet.contract.messages import JobMessage, JobState
from pipefleet_workers.consume.gate import Gate
from pipefleet_workers.consume.singles import Singles
from pipefleet_workers.ending import Ending, before
from tests.unit.conftest import eventually

DEADLINE = 20.0


class Watched(Gate):
    """Says how many threads wait in it."""

    @property
    def waiting(self) -> int:
        return len(self._changed._waiters)  # type: ignore[attr-defined]


def started(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def joined(*threads: threading.Thread) -> bool:
    for thread in threads:
        thread.join(DEADLINE)
    return not any(thread.is_alive() for thread in threads)


def be_alone(gate: Gate, inside: threading.Event, go: threading.Event) -> None:
    with gate.alone():
        inside.set()
        assert go.wait(DEADLINE)


def test_jobs_that_begin_together_enter_together_whoever_waits_to_be_alone() -> None:
    gate, alone, go = Watched(), threading.Event(), threading.Event()
    go.set()
    gate.enter()  # a job of before
    suspect = started(lambda: be_alone(gate, alone, go))
    assert eventually(lambda: gate.waiting == 1)
    starter = started(lambda: gate.enter(3))
    assert eventually(lambda: gate.waiting == 2)
    assert not alone.is_set()
    gate.leave()
    assert joined(suspect, starter), "each waits for the other"
    assert alone.is_set()
    gate.leave(2)
    assert not gate.empty
    gate.leave()
    assert gate.empty


class Interrupted(Watched):
    """As soon as the first job is inside, a suspect waits to be alone."""

    def __init__(self) -> None:
        super().__init__()
        self.was_alone, self.go = threading.Event(), threading.Event()
        self.go.set()
        self.suspect: threading.Thread | None = None

    def enter(self, count: int = 1) -> None:
        super().enter(count)
        if self.suspect is None:
            self.suspect = started(lambda: be_alone(self, self.was_alone, self.go))
            assert eventually(lambda: self.waiting == 1)


class Bystander:
    """Stands in for whatever single jobs need besides their gate; every job has ended before."""

    def start_many(self, messages: Sequence[JobMessage]) -> list[JobState]:
        return [JobState.SUCCEEDED for _ in messages]

    def done(self, delivery: Any, message: JobMessage, ending: Ending) -> None:
        assert ending == before(JobState.SUCCEEDED)


def test_single_jobs_of_one_fetch_begin_although_a_suspect_comes_in_between() -> None:
    gate, other = Interrupted(), Bystander()
    singles = Singles(other, other, gate, other, other, budget=1)  # type: ignore[arg-type]
    singles.reporting.start()
    batch: Any = [(other, JobMessage(name, "")) for name in ("a", "b", "c")]
    assert joined(started(lambda: singles.start(batch))), (
        "the second job waits for the suspect, which waits for the first"
    )
    assert gate.suspect is not None
    assert joined(gate.suspect)
    assert gate.was_alone.is_set()
    assert gate.empty
    assert singles.reporting.stop(20)


def test_several_that_must_be_alone_follow_each_other() -> None:
    gate, go = Watched(), threading.Event()
    turns = [threading.Event() for _ in range(3)]
    gate.enter()
    threads = [started(lambda turn=turn: be_alone(gate, turn, go)) for turn in turns]  # type: ignore[misc]
    assert eventually(lambda: gate.waiting == 3)
    gate.leave()
    assert eventually(lambda: any(turn.is_set() for turn in turns))
    assert sum(turn.is_set() for turn in turns) == 1
    assert not gate.empty
    go.set()
    assert joined(*threads)
    assert all(turn.is_set() for turn in turns)
    assert gate.empty


def test_an_error_inside_opens_the_gate_again() -> None:
    gate = Gate()
    with pytest.raises(KeyError), gate.alone():
        raise KeyError
    gate.enter()
    assert not gate.empty


def test_an_interrupt_while_waiting_to_be_alone_opens_the_gate_again() -> None:
    gate = Gate()
    gate.enter()

    def interrupted(condition: Callable[[], bool], timeout: float | None = None) -> bool:
        if condition():
            return True
        raise KeyboardInterrupt

    gate._changed.wait_for = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), gate.alone():
        raise AssertionError("somebody else is inside")
    gate.enter()


def test_more_cannot_leave_than_are_inside() -> None:
    gate = Gate()
    gate.enter(2)
    with pytest.raises(ValueError, match="3 jobs"):
        gate.leave(3)
    gate.leave(2)
    assert gate.empty


class Count:
    """How many are inside by their own account, and whether anybody met one who must be alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self.met = False

    def add(self, count: int, *, alone: bool = False) -> None:
        with self._lock:
            self.met |= alone and self._inside > 0
            self._inside += count


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5))
def test_no_order_of_calls_blocks_and_nobody_meets_one_who_is_alone(calls: list[list[int]]) -> None:
    """Each list is a thread's: 0 is alone, another number is that many jobs that begin together and end one by one elsewhere."""
    gate, inside = Gate(), Count()
    begun: list[threading.Thread] = []

    def end_one() -> None:
        inside.add(-1)
        gate.leave()

    def run(own: list[int]) -> None:
        for count in own:
            if not count:
                with gate.alone():
                    inside.add(1, alone=True)
                    inside.add(-1)
                continue
            gate.enter(count)
            inside.add(count)
            begun.extend(started(end_one) for _ in range(count))

    assert joined(*[started(lambda own=own: run(own)) for own in calls])  # type: ignore[misc]
    assert joined(*begun)
    assert not inside.met
    assert gate.empty
