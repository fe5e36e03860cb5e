"""When an ended process is started again."""

from __future__ import annotations

from pipefleet_workers.fleet.local.restarts import LONGEST_PAUSE, MOST_DEATHS, PARKED_SECONDS, STEADY_SECONDS, Restarts
from tests.unit.fake_clock import Clock


def die(restarts: Restarts, clock: Clock) -> float:
    """Let it die and be started again when it is due; returns the seconds between."""
    pause = restarts.died()
    assert restarts.waiting
    clock.now += pause - 0.01
    assert not restarts.due
    clock.now += 0.02
    assert restarts.due
    restarts.started()
    assert not restarts.waiting
    return pause


def test_the_pauses_grow_to_a_minute_and_then_it_is_parked() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    pauses = []
    for _ in range(MOST_DEATHS - 1):
        pauses.append(die(restarts, clock))
        assert not restarts.parked
    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE]
    assert [die(restarts, clock) for _ in range(2)] == [PARKED_SECONDS] * 2
    assert restarts.parked


def test_a_process_that_has_been_ready_for_a_while_begins_anew() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    for _ in range(5):
        die(restarts, clock)
    restarts.ready()
    clock.now += STEADY_SECONDS - 1
    restarts.ready()
    assert restarts.deaths == 5
    clock.now += 1
    restarts.ready()
    assert restarts.deaths == 0
    assert die(restarts, clock) == 1


def test_readiness_of_before_a_death_does_not_count() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    restarts.ready()
    clock.now += STEADY_SECONDS - 1
    die(restarts, clock)
    restarts.ready()
    clock.now += STEADY_SECONDS - 1
    restarts.ready()
    assert restarts.deaths == 1


def test_a_parked_process_that_is_ready_is_parked_no_more_but_dies_into_it_again() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    for _ in range(MOST_DEATHS):
        die(restarts, clock)
    assert restarts.parked
    assert restarts.ready()
    assert not restarts.parked
    assert not restarts.ready()
    assert die(restarts, clock) == PARKED_SECONDS


def test_forgiven_it_is_due_at_once_and_has_all_its_lives() -> None:
    clock = Clock()
    restarts = Restarts(clock)
    for _ in range(MOST_DEATHS):
        die(restarts, clock)
    restarts.died()
    restarts.forgive()
    assert restarts.due
    assert not restarts.parked
    restarts.started()
    assert die(restarts, clock) == 1
