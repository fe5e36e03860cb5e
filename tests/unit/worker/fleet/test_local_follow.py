"""A fleet file that is edited under running workers: who starts, who goes on, who ends, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from pipefleet.contract.messages import JobItem, JobMessage, Priority
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.celery import push_job
from pipefleet.queues.keys import ledger_keys, queue_list
from pipefleet_workers.fleet.local.follow import QUIET_SECONDS, outstanding
from pipefleet_workers.fleet.local.restarts import MOST_DEATHS
from tests.unit.fake_crew import FakeCrew, copy_of, pid, table, until

TEXTS = table("texts", "a")
VECTORS = table("vectors", "a", task="feature-extraction")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[FakeCrew]:
    one = FakeCrew(tmp_path, TEXTS, VECTORS)
    try:
        one.begin()
        yield one
    finally:
        one.stop()


@pytest.fixture
def own(tmp_path: Path) -> Callable[[str], str]:
    """The queue of a model of the pool `texts`."""
    return lambda model: revision_queue("pipefleet.text-classification", str(tmp_path / model), None)


def test_a_pool_more_starts_and_the_others_are_not_touched(world: FakeCrew, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.pids("texts") + world.pids("vectors")
    world.write(TEXTS, VECTORS, table("pictures", "b", "workers = { min = 2, max = 2 }", task="image-classification"))
    world.steps_until(lambda: world.serving("pictures") == ["b", "b"])
    assert world.pids("texts") + world.pids("vectors") == before
    assert "pool pictures: added, image-classification with " in capsys.readouterr().out


def test_a_pool_that_gets_no_jobs_is_named_when_the_file_is_read(
    world: FakeCrew, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "gets no jobs" not in capsys.readouterr().err
    world.take(TEXTS + "default = true\n", VECTORS, table("halves", "a", 'dtype = "float16"'))
    assert "pool halves gets no jobs: those for " in capsys.readouterr().err


def test_a_pool_that_is_removed_ends_once_its_queue_is_empty(
    world: FakeCrew, capsys: pytest.CaptureFixture[str]
) -> None:
    world.messages["pipefleet.feature-extraction"] = 3
    kept, (going,) = world.pids("texts"), world.crew.of("vectors")
    world.take(TEXTS)
    for _ in range(20):
        world.step(QUIET_SECONDS)
    assert world.serving("vectors") == ["a"]
    world.kill(going)
    world.steps_until(lambda: world.serving("vectors") == ["a"])  # it still has its description
    world.messages.clear()
    world.steps_until(lambda: not list(world.crew.replaced))
    assert [worker.pool for worker in world.crew] == ["texts"]
    assert world.pids("texts") == kept
    said = capsys.readouterr().out
    assert "pool vectors: removed; its workers end when nothing waits for them" in said
    assert "pool vectors: its former workers end, nothing waits for them" in said


def test_more_workers_are_started_and_fewer_are_drained(world: FakeCrew) -> None:
    (first,) = world.pids("texts")
    world.take(table("texts", "a", "workers = { min = 3, max = 3 }"), VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a"] * 3)
    assert first in world.pids("texts")
    world.take(TEXTS, VECTORS)
    world.steps_until(lambda: len(list(world.crew)) == 2)
    assert world.pids("texts") == [first]


def test_another_model_serves_beside_the_old_one_until_nothing_waits_for_that(
    world: FakeCrew, tmp_path: Path, capsys: pytest.CaptureFixture[str], own: Callable[[str], str]
) -> None:
    others, slow = world.pids("vectors"), tmp_path / "b" / "slow"
    slow.touch()
    world.messages[own("a")] = 1
    world.messages["pipefleet.text-classification"] = 100  # whoever comes serves these
    world.write(table("texts", "b"), VECTORS)
    world.steps_until(lambda: bool(world.crew.replaced))
    for _ in range(5):
        world.step(QUIET_SECONDS)
    assert world.serving("texts") == ["a"]  # the new one is not ready
    slow.unlink()
    world.steps_until(lambda: world.serving("texts") == ["a", "b"])
    for _ in range(5):
        world.step(QUIET_SECONDS)
    assert world.serving("texts") == ["a", "b"]  # a message waits for the old one
    world.messages[own("a")] = 0
    world.step(1.0)
    world.step(QUIET_SECONDS - 0.1)
    world.messages[own("a")] = 1  # the run went on
    world.step(1.0)
    world.messages[own("a")] = 0
    world.step(1.0)
    world.step(QUIET_SECONDS - 0.1)
    assert world.serving("texts") == ["a", "b"]
    world.steps_until(lambda: world.serving("texts") == ["b"] and not world.crew.replaced)
    assert world.pids("vectors") == others
    said = capsys.readouterr().out
    assert f"pool texts: model {tmp_path / 'a'} -> {tmp_path / 'b'}; 1 new worker starts" in said


def test_an_old_worker_that_dies_in_a_roll_out_comes_back_as_it_was(world: FakeCrew, own: Callable[[str], str]) -> None:
    (old,) = world.crew.of("texts")
    world.messages[own("a")] = 1
    world.take(table("texts", "b"), VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a", "b"])
    world.kill(old)
    assert world.serving("texts") == ["b"]
    world.steps_until(lambda: world.serving("texts") == ["a", "b"])


def test_a_roll_back_keeps_the_workers_that_are_there(world: FakeCrew, own: Callable[[str], str]) -> None:
    before = world.pids("texts")
    world.messages[own("a")] = 1
    world.take(table("texts", "b"), VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a", "b"])
    world.messages.clear()
    world.take(TEXTS, VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a"] and not world.crew.replaced)
    assert world.pids("texts") == before


def test_workers_stay_while_clients_may_believe_that_new_work_goes_to_them(
    tmp_path: Path, own: Callable[[str], str]
) -> None:
    world = FakeCrew(tmp_path, TEXTS, believed=60.0)
    try:
        world.begin()
        world.take(table("texts", "b"))
        began = world.clock.now
        until(lambda: world.serving("texts") == ["a", "b"])
        world.step(50.0)
        world.step(1.0)
        assert world.serving("texts") == ["a", "b"]
        world.messages[own("a")] = 1  # from a client that has read the announcements before the change
        world.step(30.0)
        world.step(1.0)
        assert world.serving("texts") == ["a", "b"]
        world.messages.clear()
        world.steps_until(lambda: world.serving("texts") == ["b"] and not world.crew.replaced)
        assert world.clock.now - began >= 60.0
    finally:
        world.stop()


def test_a_revision_that_the_file_keeps_as_the_previous_one_has_workers_of_its_own(
    world: FakeCrew, tmp_path: Path, own: Callable[[str], str]
) -> None:
    (old,), slow = world.crew.of("texts"), tmp_path / "a" / "slow"
    slow.touch()
    world.messages[own("a")] = 1
    world.take(table("texts", "b", 'previous = { model = "./a" }'), VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a", "b"])
    for _ in range(5):
        world.step(QUIET_SECONDS)
    assert old in world.crew.replaced[0].staying()  # its successor is not ready
    slow.unlink()
    world.steps_until(lambda: not world.crew.replaced)
    assert (world.serving("texts"), world.serving("texts@previous")) == (["b"], ["a"])
    (kept,) = world.crew.of("texts@previous")
    assert copy_of(kept)["pools"]["texts"]["previous"] == [{"model": str(tmp_path / "a")}]  # type: ignore[index]
    world.take(table("texts", "b"), VECTORS)
    for _ in range(5):
        world.step(QUIET_SECONDS)
    assert world.serving("texts@previous") == ["a"]
    world.messages.clear()
    world.steps_until(lambda: not world.crew.replaced)
    assert (world.serving("texts"), world.serving("texts@previous")) == (["b"], [])


def test_three_versions_at_once_end_in_the_last(world: FakeCrew, own: Callable[[str], str]) -> None:
    world.messages[own("a")] = 1
    world.messages[own("b")] = 1
    world.take(table("texts", "b"), VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a", "b"])
    world.take(table("texts", "c"), VECTORS)
    world.steps_until(lambda: world.serving("texts") == ["a", "b", "c"])
    world.messages.clear()
    world.steps_until(lambda: world.serving("texts") == ["c"] and not world.crew.replaced)


def test_with_other_parameters_alone_the_old_workers_end_when_the_new_ones_are_ready(
    world: FakeCrew, tmp_path: Path, own: Callable[[str], str]
) -> None:
    world.messages[own("a")] = 50
    world.messages["pipefleet.text-classification"] = 50
    (old,) = world.pids("texts")
    (tmp_path / "a" / "slow").touch()
    world.take(table("texts", "a", "parameters = { top_k = 2 }"), VECTORS)
    for _ in range(5):
        world.step(QUIET_SECONDS)
    assert old in [pid(worker) for worker in world.crew if worker.answers()]
    (tmp_path / "a" / "slow").unlink()
    world.steps_until(lambda: not world.crew.replaced)
    (new,) = world.crew.of("texts")
    assert pid(new) != old
    assert copy_of(new)["pools"]["texts"]["parameters"] == {"top_k": 2}  # type: ignore[index]


def test_a_new_model_that_does_not_load_leaves_the_old_one_serving(
    world: FakeCrew, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b" / "broken").touch()
    before = world.pids("texts")
    world.take(table("texts", "b"), VECTORS)
    world.steps_until(lambda: "texts" in world.crew.parked())
    assert [pid(worker) for worker in world.crew.replaced[0].staying()] == before
    assert world.serving("texts") == ["a"]
    assert world.crew.parked()["texts"].reason == "worker-texts-3 exited with status 1: this model is broken"
    assert "stays down" in capsys.readouterr().err
    world.take(TEXTS, VECTORS)
    world.steps_until(lambda: not world.crew.replaced)
    assert world.pids("texts") == before
    assert world.crew.parked() == {}


def test_a_wrong_file_changes_nothing_and_the_next_good_one_is_taken(
    world: FakeCrew, capsys: pytest.CaptureFixture[str]
) -> None:
    before = world.pids("texts") + world.pids("vectors")
    for content in (TEXTS.replace("model", "modle"), "", table("texts", "nowhere")):
        world.write(content)
        for _ in range(4):
            world.step(1.0)
    assert world.pids("texts") + world.pids("vectors") == before
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the fleet file is refused")]
    assert len(refused) == 3
    assert "pools.texts has an unknown key 'modle' (did you mean 'model'?)" in refused[0]
    world.write(TEXTS, VECTORS, table("pictures", "b", task="image-classification"))
    world.steps_until(lambda: world.serving("pictures") == ["b"])


def test_a_broken_pool_is_tried_again_when_its_table_changes(world: FakeCrew, tmp_path: Path) -> None:
    (tmp_path / "b" / "broken").touch()
    broken = table("pictures", "b", task="image-classification")
    world.take(TEXTS, VECTORS, broken)
    world.steps_until(lambda: "pictures" in world.crew.parked())
    (tmp_path / "b" / "broken").unlink()
    (parked,) = world.crew.of("pictures")
    assert parked.restarts.deaths == MOST_DEATHS
    world.take(TEXTS, VECTORS, broken + "wait_slo = 5\n")
    world.steps_until(lambda: world.serving("pictures") == ["b"])
    assert world.crew.parked() == {}


def test_with_an_autoscaler_a_pool_starts_with_its_minimum_and_rolls_with_what_it_has(tmp_path: Path) -> None:
    world = FakeCrew(tmp_path, TEXTS, least=0)
    try:
        world.begin()
        assert list(world.crew) == []
        world.crew.start("texts")
        world.crew.start("texts")
        world.steps_until(lambda: world.serving("texts") == ["a", "a"])
        world.take(
            table("texts", "b"), table("vectors", "a", "workers = { min = 1, max = 2 }", task="feature-extraction")
        )
        world.steps_until(lambda: world.serving("texts") == ["b", "b"] and world.serving("vectors") == ["a"])
        assert len(world.versions) == 2
        assert "vectors" in world.versions[1].read_text()
    finally:
        world.stop()


def test_where_no_worker_of_the_old_model_runs_one_starts_for_what_waits(
    tmp_path: Path, own: Callable[[str], str]
) -> None:
    world = FakeCrew(tmp_path, TEXTS, least=0)
    try:
        world.begin()
        world.messages[own("a")] = 1
        world.take(table("texts", "b"))
        world.steps_until(lambda: world.serving("texts") == ["a"])
        world.messages.clear()
        world.steps_until(lambda: not list(world.crew) and not world.crew.replaced)
    finally:
        world.stop()


def test_every_version_has_a_copy_and_the_next_start_removes_them(world: FakeCrew, tmp_path: Path) -> None:
    world.take(table("texts", "b"), VECTORS)
    assert len(list((tmp_path / "run").glob("fleet-*.toml"))) == 2
    world.stop()
    world.begin()
    assert len(list((tmp_path / "run").glob("fleet-*.toml"))) == 1


def test_what_is_outstanding_waits_or_is_with_a_worker_and_counts_for_its_own_queue(redis: Redis) -> None:
    url, queue = "redis://127.0.0.1", "pipefleet.text-classification"
    pipe = redis.pipeline()
    for priority in Priority:
        job = JobMessage(f"j{priority}", "text-classification", items=(JobItem("0", "text"),), cost=5.0)
        push_job(pipe, job, queue, priority)
    pipe.execute()
    message = redis.lindex(queue_list(queue, Priority.NORMAL), 0)
    ledger = ledger_keys(queue)["unacked_key"]
    redis.hset(ledger, "mine", b'[%b, "", "%b"]' % (message, queue.encode()))
    redis.hset(ledger, "another's", b'[%b, "", "%b@0123abcd"]' % (message, queue.encode()))
    assert outstanding(redis, url, [queue]) == len(Priority) + 1
    assert outstanding(redis, url, []) == 0
    assert outstanding(redis, url, ["pipefleet.other"]) == 0
