"""Runs that several look after, or that lose what they stand on: moved, resumed by many, refused, and emptied out of Redis."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.shards import shard_index
from pipefleet.errors import RunError
from pipefleet.queues import dead_letters
from pipefleet.runs.planner import Planner
from pipefleet.runs.run import Run
from tests.unit.conftest import eventually
from tests.unit.shard_worker import ShardWorker, read

TEXTS = "text-classification"
OLD, NEW = f"pipefleet.{TEXTS}", f"pipefleet.{TEXTS}.new"
FLEET = """
[pools.old]
task = "text-classification"
model = "/models/old"
default = true

[pools.new]
task = "text-classification"
model = "/models/new"
"""


@pytest.fixture
def environment(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two pools of one task; planners look often, and two shards may be outstanding where a test says so."""
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    monkeypatch.setenv("PIPEFLEET_FLEET", str(path))
    monkeypatch.setattr("pipefleet.runs.planner.TEND_SECONDS", 0.05)
    monkeypatch.setattr("pipefleet.runs.planner.HELD_BACK_SECONDS", 0.05)
    monkeypatch.setattr("pipefleet.runs.backlog.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("pipefleet.runs.resume.TAKE_OVER_SECONDS", 1.0)
    return environment


@pytest.fixture
def bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that has two shards outstanding at most."""
    monkeypatch.setenv("PIPEFLEET_OUTSTANDING_SHARDS", "2")
    with Client() as one:
        yield one
        for run in one._runs_in_planning():
            run.stop_planning()


@pytest.fixture
def old(client: Client) -> ShardWorker:
    return ShardWorker(client, OLD)


@pytest.fixture
def new(client: Client) -> ShardWorker:
    return ShardWorker(client, NEW)


class Held:
    """A source that keeps its last item back until `go_on`."""

    def __init__(self, first: int) -> None:
        self.first, self.gate = first, threading.Event()

    def __iter__(self) -> Iterator[str]:
        yield from map(str, range(self.first))
        self.gate.wait(60)
        yield "last"

    def go_on(self, run: Run) -> None:
        self.gate.set()
        run.join_planner()


def planned(client: Client, prefix: str, shards: int = 3) -> Run:
    run = client.map(TEXTS, [str(number) for number in range(shards)], output=prefix, shard_size=1)
    run.join_planner()
    return run


def waiting(worker: ShardWorker, run: Run) -> list[int]:
    """The indexes of the shards in the queues of the worker's pool, each as often as it is there, sorted."""
    lists = (raw for name in worker.lists() for raw in worker.client.redis.lrange(name, 0, -1))
    return sorted(index for raw in lists if (index := shard_index(run.id, read(raw.decode()).id)) is not None)


def work_to_the_end(run: Run, worker: ShardWorker) -> None:
    for _ in range(50):
        for text in worker.take().values():
            worker.do(text)
        if run.progress().ended:
            break
        assert eventually(lambda: bool(waiting(worker, run)) or run.progress().ended)
    assert run.wait(timeout=20).ended


class TestEmptied:
    """Redis loses all, in one moment."""

    def test_after_the_planning_every_client_says_so_and_resume_mends_it(
        self, client: Client, prefix: str, old: ShardWorker, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        monkeypatch.setattr("pipefleet.runs.planner.ALIVE_SECONDS", 1.0)
        run = planned(client, prefix)
        old.do(old.take(0)[0])
        client.redis.flushall()
        now = run.progress()
        assert (now.state, now.reason) == ("stopped", "Redis was emptied, and what waited in it is lost")
        for one in (run, client.run(prefix)):
            with pytest.raises(
                RunError, match=f"has stopped: Redis was emptied.*go on with `pipefleet resume {prefix}`"
            ):
                one.wait(timeout=20)
        main(["status", prefix])
        assert "Redis was emptied" in "".join(capsys.readouterr())
        assert run.resume() == 2
        assert run.progress().state == "running"
        work_to_the_end(run, old)
        assert run.progress().state == "succeeded"

    def test_a_run_that_ended_is_not_called_stopped(self, client: Client, prefix: str, old: ShardWorker) -> None:
        run = planned(client, prefix)
        assert not run.progress().ended
        for text in old.take().values():
            old.do(text)
        client.redis.flushall()
        assert run.progress().state == "succeeded"

    def test_a_planner_at_work_leaves_refused_shards_refused(
        self, client: Client, prefix: str, old: ShardWorker
    ) -> None:
        source = Held(3)
        run = client.map(TEXTS, source, output=prefix, shard_size=1)
        assert eventually(lambda: waiting(old, run) == [0, 1, 2])
        old.refuse(old.take(1)[1], "not for us")
        assert eventually(lambda: client.store.head(RunLayout.at(prefix).refused_shard(1)) is not None)
        client.redis.flushall()
        mended = eventually(lambda: waiting(old, run) == [0, 2] and run.progress().refused == 1)
        source.go_on(run)
        assert mended
        work_to_the_end(run, old)
        ended = run.progress()
        assert (ended.state, ended.items, ended.failed, ended.refused) == ("partial", 4, 1, 1)
        assert [row["error"]["message"] for row in run.failures()] == ["not for us"]


class TestMoved:
    def test_a_planner_of_another_client_follows_with_the_refused_shards(
        self, client: Client, prefix: str, old: ShardWorker, new: ShardWorker
    ) -> None:
        source = Held(3)
        run = client.map(TEXTS, source, output=prefix, shard_size=1)
        assert eventually(lambda: waiting(old, run) == [0, 1, 2])
        old.refuse(old.take(1)[1])
        with Client() as other:
            assert other.run(prefix).resume(model="/models/new") == 1
        followed = eventually(lambda: waiting(new, run) == [0, 1, 2])
        source.go_on(run)
        assert followed
        assert (waiting(old, run), waiting(new, run)) == ([], [0, 1, 2, 3])
        assert dead_letters.count_dead_letters(client.redis, OLD) == 0
        work_to_the_end(run, new)
        assert run.progress().state == "succeeded"

    def test_a_planner_knows_where_to_though_redis_was_emptied(
        self, bounded: Client, prefix: str, old: ShardWorker, new: ShardWorker
    ) -> None:
        run = bounded.map(TEXTS, iter("abcde"), output=prefix, shard_size=1)
        assert eventually(lambda: waiting(old, run) == [0, 1])
        with Client() as other:
            other.run(prefix).resume(model="/models/new")
        bounded.redis.flushall()
        work_to_the_end(run, new)
        assert waiting(old, run) == []
        assert [row["provenance"]["model"] for row in run.results()] == ["test"] * 5

    def test_refused_shards_of_a_run_that_has_ended_run_on_the_new_model(
        self, client: Client, prefix: str, old: ShardWorker, new: ShardWorker
    ) -> None:
        run = planned(client, prefix)
        texts = old.take()
        old.do(texts[0])
        for index in (1, 2):
            old.refuse(texts[index])
        assert run.wait(timeout=20).state == "partial"
        again = client.run(prefix)
        assert again.resume(model="/models/new") == 2
        again.join_planner()
        assert (waiting(old, run), waiting(new, run)) == ([], [1, 2])
        assert dead_letters.count_dead_letters(client.redis, OLD) == 0
        texts = new.take()
        assert {read(text).model for text in texts.values()} == {"/models/new"}
        for text in texts.values():
            new.do(text)
        assert run.wait(timeout=20).state == "succeeded"

    @pytest.mark.parametrize("told", [True, False])
    def test_a_dead_letter_of_before_is_queued_where_the_run_went(
        self, client: Client, prefix: str, old: ShardWorker, new: ShardWorker, told: bool
    ) -> None:
        run = planned(client, prefix)
        text = old.take(1)[1]
        moving = client.run(prefix)
        assert moving.resume(model="/models/new") == 3
        moving.join_planner()
        new.take(1)
        letter = old.bury(text)
        if told:
            old.tell(letter)
        assert main(["dead-letters", "--requeue"]) == 0
        assert (waiting(old, run), waiting(new, run)) == ([], [0, 1, 2])
        assert dead_letters.count_dead_letters(client.redis, OLD) == 0

    def test_a_client_that_waits_hears_where_the_run_went(self, client: Client, prefix: str) -> None:
        run = planned(client, prefix)
        other = client.run(prefix)
        other.resume(model="/models/new")
        other.join_planner()
        run._next_look = 0.0
        run.progress()
        assert run.plan == other.plan


class TestResumedByMany:
    def test_of_two_clients_one_goes_on(self, client: Client, bounded: Client, prefix: str, old: ShardWorker) -> None:
        run = planned(client, prefix, shards=6)
        client.redis.flushall()
        found: list[Any] = []
        together = threading.Barrier(2)

        def resume(one: Run) -> None:
            together.wait(20)
            try:
                found.append(one.resume())
            except RunError as error:
                found.append(str(error))

        with Client() as second:
            threads = [threading.Thread(target=resume, args=(one.run(prefix),)) for one in (bounded, second)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert sorted(map(str, found))[0] == "6"
            assert "another client plans the run" in sorted(map(str, found))[1]
            assert eventually(lambda: waiting(old, run) == [0, 1])
            work_to_the_end(run, old)

    def test_twice_by_one_client_queues_each_shard_once(
        self, client: Client, bounded: Client, prefix: str, old: ShardWorker
    ) -> None:
        planned(client, prefix, shards=6)
        client.redis.flushall()
        run = bounded.run(prefix)
        assert run.resume() == 6
        assert eventually(lambda: waiting(old, run) == [0, 1])
        threads = [threading.Thread(target=run.resume) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert waiting(old, run) == [0, 1]
        work_to_the_end(run, old)
        run.join_planner()

    def test_while_the_thread_that_queued_is_about_to_end(
        self, client: Client, prefix: str, old: ShardWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planned(client, prefix)
        client.redis.flushall()
        run = client.run(prefix)
        returned, leave, whole = threading.Event(), threading.Event(), Planner.run

        def pausing(self: Planner) -> bool:
            planned = whole(self)
            returned.set()
            leave.wait(60)
            return planned

        monkeypatch.setattr(Planner, "run", pausing)
        monkeypatch.setattr("pipefleet.runs.planner.TEND_SECONDS", 60.0)  # or that thread finds the shard first
        assert run.resume() == 3
        assert returned.wait(20)
        old.refuse(old.take(1)[1])
        missing = run.resume()
        leave.set()
        run.join_planner()
        assert missing == 1
        assert waiting(old, run) == [0, 1, 2]
        assert run.progress().reason is None


def test_a_refused_shard_with_items_that_could_not_be_prepared_is_sealed(
    client: Client, prefix: str, old: ShardWorker
) -> None:
    values = ["a", {"inputs": {"$ref": 3}, "id": "odd"}, {"inputs": 3, "id": "three"}, "d", "e"]
    run = client.map(TEXTS, iter(values), output=prefix, shard_size=4)
    run.join_planner()
    texts = old.take()
    old.do(texts[1])
    old.refuse(texts[0], "not for us")
    ended = run.wait(timeout=20)
    assert (ended.state, ended.items, ended.failed, ended.refused) == ("partial", 5, 4, 1)
    rows = list(run.results())
    assert [(row["id"], row["input"]) for row in rows[:4]] == [
        ("0", "a"), ("odd", None), ("three", 3), ("3", "d"),
    ]  # fmt: skip
    said = [row["error"] for row in rows[:4]]
    assert [(one["code"], one["stage"] == "plan") for one in said[1:3]] == [("bad_input", True)] * 2
    assert [one["message"] for one in (said[0], said[3])] == ["not for us"] * 2
    assert json.loads(client.store.get(RunLayout.at(prefix).success))["failed"] == 4
