"""Workers that end by themselves: started again after growing pauses, parked alone, tried again, and told of in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from pipefleet.queues.keys import PARKED_KEY
from pipefleet_workers.fleet.local.parked import TOLD_SECONDS, Parked, parked_pools, tell_parked
from pipefleet_workers.fleet.local.restarts import MOST_DEATHS, PARKED_SECONDS, STEADY_SECONDS
from pipefleet_workers.fleet.local.workers import WorkerProcess, worker_command
from tests.unit.fake_crew import FakeCrew, pid, table, until

TEXTS = table("texts", "a", "workers = { min = 2, max = 2 }")
VECTORS = table("vectors", "b", task="feature-extraction")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FakeCrew]:
    one = FakeCrew(tmp_path, TEXTS, VECTORS)
    try:
        one.begin()
        yield one
    finally:
        one.stop()


def die(world: FakeCrew, worker: WorkerProcess) -> float:
    """Kill a worker, and look until it lives again; returns the pause between, in whole seconds."""
    world.kill(worker)
    world.step()
    pause = 0
    while worker.ended():
        assert pause < 2 * PARKED_SECONDS
        pause += 1
        world.step(1.0)
    until(worker.answers)
    return pause


def park(world: FakeCrew, worker: WorkerProcess) -> list[float]:
    """Kill a worker until it stays down; returns the pauses."""
    pauses = [die(world, worker) for _ in range(MOST_DEATHS - 1)]
    world.kill(worker)
    world.step()
    return pauses


def test_a_worker_that_keeps_ending_is_parked_alone(world: FakeCrew, capsys: pytest.CaptureFixture[str]) -> None:
    (victim,) = world.crew.of("vectors")
    others = world.pids("texts")
    assert park(world, victim) == [1, 2, 4, 8, 16, 32, 60]
    assert world.crew.parked() == {"vectors": Parked(1, 1, "worker-vectors-3 was killed by SIGKILL: its log is empty")}
    assert world.crew.silent_pools() == ["vectors"]
    world.step(PARKED_SECONDS - 1)
    assert victim.ended()
    assert world.pids("texts") == others
    said = capsys.readouterr().err
    assert said.count("starting it again in ") == MOST_DEATHS - 1
    assert f"it ended {MOST_DEATHS} times in a row and stays down; 0 of 1 workers of the pool go on" in said


def test_its_siblings_go_on(world: FakeCrew) -> None:
    victim, sibling = world.crew.of("texts")
    park(world, victim)
    assert sibling.answers()
    assert world.crew.silent_pools() == []
    assert (world.crew.parked()["texts"].down, world.crew.parked()["texts"].of) == (1, 2)


def test_a_parked_worker_is_tried_again_after_a_while(world: FakeCrew, capsys: pytest.CaptureFixture[str]) -> None:
    (victim,) = world.crew.of("vectors")
    park(world, victim)
    world.step(PARKED_SECONDS)
    world.steps_until(lambda: not world.crew.parked())
    assert victim.answers()
    assert "worker-vectors-3 is ready again" in capsys.readouterr().out
    world.kill(victim)
    world.step()
    assert "vectors" in world.crew.parked()  # one death more is enough, until it has been ready for a while


def test_a_reload_tries_it_again_at_once(world: FakeCrew) -> None:
    (victim,) = world.crew.of("vectors")
    park(world, victim)
    world.step(reload=True)
    world.steps_until(victim.answers)
    assert victim.restarts.deaths == 0


def test_a_worker_that_was_ready_for_a_while_begins_to_count_anew(world: FakeCrew) -> None:
    (victim,) = world.crew.of("vectors")
    for _ in range(2):
        for _ in range(MOST_DEATHS - 2):
            die(world, victim)
        world.step()
        world.step(STEADY_SECONDS)
    assert world.crew.parked() == {}
    assert die(world, victim) == 1


def test_a_worker_that_is_drained_while_it_is_down_is_forgotten(world: FakeCrew) -> None:
    victim, sibling = world.crew.of("texts")
    world.kill(victim)
    world.step()
    victim.drain()
    world.step()
    assert world.pids("texts") == [pid(sibling)]


def test_parked_pools_are_told_for_a_while_and_replaced_as_a_whole(redis: Redis) -> None:
    assert parked_pools(redis) == {}
    one, two = Parked(1, 2, "ended"), Parked(2, 2, 'said "no"')
    tell_parked(redis, {"texts": one, "vectors": two})
    assert parked_pools(redis) == {"texts": one, "vectors": two}
    assert 0 < redis.pttl(PARKED_KEY) <= TOLD_SECONDS * 1000
    tell_parked(redis, {"vectors": two})
    assert parked_pools(redis) == {"vectors": two}
    tell_parked(redis, {})
    assert parked_pools(redis) == {}
    redis.hset(PARKED_KEY, "texts", "of a later version")
    assert parked_pools(redis) == {}


def test_a_fleet_that_may_be_unpinned_is_so_for_its_workers_too(tmp_path: Path) -> None:
    assert "--allow-unpinned" in worker_command("texts", tmp_path, allow_unpinned=True)
    assert "--allow-unpinned" not in worker_command("texts", tmp_path)
