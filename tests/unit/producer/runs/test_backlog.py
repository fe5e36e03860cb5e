"""What Redis loses is queued again, by the planner itself or by `resume`, within the bound of outstanding shards."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout, RunPlan
from pipefleet.contract.messages import JobItem, Priority
from pipefleet.contract.shards import encode_shard_line, shard_message
from pipefleet.errors import RunError
from pipefleet.patience import Patience
from pipefleet.queues.keys import queue_list, queue_lists, run_key
from pipefleet.queues.looking import _ids, queued_ids
from pipefleet.queues.revision_notes import queues_of
from pipefleet.runs.backlog import Backlog
from pipefleet.runs.planner import Planner
from pipefleet.runs.run import Run
from pipefleet.storage.store import ObjectStore
from tests.unit.conftest import eventually
from tests.unit.producer.runs.test_planner import plan

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"


def waiting(client: Client) -> list[int]:
    """The indexes of the shards in the queue, sorted."""
    return sorted(int(one.rpartition("-")[2]) for one in queued_ids(client.redis, QUEUE))


def empty_queue(client: Client) -> None:
    client.redis.delete(*(name for queue in queues_of(client.redis, QUEUE) for name in queue_lists(queue)))


def work(client: Client, run: Run, *, failing: bool = False) -> int:
    """Do what a worker does for the oldest shard of the queue; its index."""
    from pipefleet.runs.finishing import finalise
    from pipefleet.runs.planner import read_plan

    raw = client.redis.rpop(queue_list(run.plan.queue, Priority.LOW))
    (job_id,) = _ids([raw])  # type: ignore[list-item]
    index, layout = int(job_id.rpartition("-")[2]), RunLayout.at(run.uri)
    row = b'"error":{"code":"c","message":"m","stage":"s"}' if failing else b'"output":1'
    body = b"".join(b'{"id":"x","input":"a",' + row + b"}\n" for _ in client.store.lines(layout.shard(index)))
    client.store.put_new(layout.part(index), body)
    client.redis.setbit(run_key(run.id, "parts"), index, 1)
    shards = client.redis.hget(run_key(run.id), "shards")
    if shards is not None and client.redis.bitcount(run_key(run.id, "parts")) >= int(shards):
        finalise(client.store, layout, read_plan(client.store, layout), now=client.now())
    return index


@pytest.fixture
def bounded(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A client that has four shards outstanding at most, and looks often."""
    monkeypatch.setenv("PIPEFLEET_OUTSTANDING_SHARDS", "4")
    monkeypatch.setattr("pipefleet.runs.planner.HELD_BACK_SECONDS", 0.05)
    monkeypatch.setattr("pipefleet.runs.planner.TEND_SECONDS", 0.05)
    monkeypatch.setattr("pipefleet.runs.backlog.LOOK_SECONDS", 0.0)
    with Client() as one:
        yield one
        for run in one._runs_in_planning():  # a test that failed half way would wait for the fleet
            run.stop_planning()


def work_to_the_end(client: Client, run: Run) -> None:
    """Play the worker until the run has ended; never are more than four shards queued."""
    deadline = itertools.count()
    while client.store.head(RunLayout.at(run.uri).success) is None:
        assert eventually(lambda: bool(waiting(client)) or client.store.head(RunLayout.at(run.uri).success) is not None)
        assert len(waiting(client)) <= 4
        if waiting(client):
            work(client, run)
        assert next(deadline) < 100


class TestPlannerAlone:
    """The planner mends what is lost; nobody calls resume."""

    def test_it_queues_again_what_an_emptied_redis_lost_and_the_run_ends(self, bounded: Client, prefix: str) -> None:
        run = bounded.map(TEXTS, (str(number) for number in range(20)), output=prefix, shard_size=2)
        assert eventually(lambda: waiting(bounded) == [0, 1, 2, 3])
        assert [work(bounded, run), work(bounded, run, failing=True)] == [0, 1]
        assert eventually(lambda: waiting(bounded) == [2, 3, 4, 5])
        bounded.redis.flushall()
        assert eventually(lambda: waiting(bounded) == [2, 3, 4, 5])
        assert eventually(lambda: run.progress().parts == 2)
        assert (run.progress().succeeded, run.progress().failed) == (2, 2)
        work_to_the_end(bounded, run)
        run.join_planner()
        ended = run.wait(timeout=20)
        assert (ended.items, ended.failed, ended.shards) == (20, 2, 10)
        assert len(list(run.failures())) == 2

    def test_it_finds_that_the_queue_was_purged(
        self, bounded: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.runs.backlog.STALLED_SECONDS", 0.2)
        run = bounded.map(TEXTS, (str(number) for number in range(6)), output=prefix, shard_size=1)
        assert eventually(lambda: waiting(bounded) == [0, 1, 2, 3])
        empty_queue(bounded)
        work_to_the_end(bounded, run)
        run.join_planner()

    def test_it_mends_while_its_source_gives_nothing(self, bounded: Client, prefix: str) -> None:
        hold = threading.Event()

        def source() -> Iterator[str]:
            yield from "ab"
            hold.wait(60)
            yield "c"

        run = bounded.map(TEXTS, source(), output=prefix, shard_size=1)
        assert eventually(lambda: waiting(bounded) == [0, 1])
        bounded.redis.flushall()
        mended = eventually(lambda: waiting(bounded) == [0, 1])
        hold.set()
        run.join_planner()
        assert mended
        assert waiting(bounded) == [0, 1, 2]

    def test_it_stops_when_the_run_is_cancelled_elsewhere_though_redis_forgets_it(
        self, bounded: Client, prefix: str
    ) -> None:
        run = bounded.map(TEXTS, (str(number) for number in itertools.count()), output=prefix, shard_size=1)
        assert eventually(lambda: len(waiting(bounded)) == 4)
        bounded.store.put(RunLayout.at(prefix).cancelled, b"{}")  # as `cancel` does, and then
        bounded.redis.flushall()
        assert eventually(lambda: not run.planning)
        assert waiting(bounded) == []
        assert run.progress().state == "cancelled"

    def test_shards_that_no_worker_will_run_are_not_waited_for(self, bounded: Client, prefix: str) -> None:
        run = bounded.map(TEXTS, (str(number) for number in range(6)), output=prefix, shard_size=1)
        assert eventually(lambda: waiting(bounded) == [0, 1, 2, 3])
        empty_queue(bounded)
        bounded.redis.hset(run_key(run.id, "refused"), mapping={str(index): "{}" for index in range(4)})
        run.join_planner()
        assert waiting(bounded) == [4, 5]


class TestResume:
    def test_it_queues_within_the_bound(self, bounded: Client, prefix: str) -> None:
        layout = RunLayout.at(prefix)
        ended_plan = written(bounded, layout, shards=20)
        run = bounded.run(prefix)
        assert run.resume() == 20
        assert eventually(lambda: len(waiting(bounded)) == 4)
        assert run.planning
        assert work(bounded, run) == 0
        assert eventually(lambda: waiting(bounded) == [1, 2, 3, 4])
        work_to_the_end(bounded, run)
        run.join_planner()
        ended = run.wait(timeout=20)
        assert (ended.state, ended.items, ended.shards) == ("succeeded", 40, 20)
        assert ended_plan.id == run.id

    def test_an_interrupted_one_is_taken_up_by_the_next(self, bounded: Client, prefix: str) -> None:
        written(bounded, RunLayout.at(prefix), shards=10)
        run = bounded.run(prefix)
        run.resume()
        assert eventually(lambda: len(waiting(bounded)) == 4)
        run.stop_planning()
        run.join_planner()
        again = bounded.run(prefix)
        assert again.progress().state == "stopped"
        with pytest.raises(RunError, match=r"has stopped: 6 shards are not queued, .* go on with `pipefleet resume"):
            again.wait(timeout=20)
        assert again.resume() == 6
        work_to_the_end(bounded, again)
        again.join_planner()

    def test_each_message_says_where_its_shard_begins_and_ends(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layout = RunLayout.at(prefix)
        run_plan = written(client, layout, shards=5)
        published: list[Any] = []
        monkeypatch.setattr(client, "publish", lambda messages, *_: published.extend(messages))
        client.store.put(layout.part(2), b'{"id":"x","input":"a","output":1}\n' * 2)
        run = client.run(prefix)
        assert run.resume() == 4
        run.join_planner()
        assert published == [shard_message(run_plan, layout, index, 2 * index, 2) for index in (0, 1, 3, 4)]

    def test_it_reads_little_of_each_missing_shard(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written(client, RunLayout.at(prefix), shards=30)
        whole, small = counted(monkeypatch, "lines"), counted(monkeypatch, "start")
        run = client.run(prefix)
        assert run.resume() == 30
        run.join_planner()
        assert len(waiting(client)) == 30
        assert (len(whole), len(small)) == (1, 30)

    def test_a_run_all_of_whose_parts_are_there_ends(self, client: Client, prefix: str) -> None:
        layout = RunLayout.at(prefix)
        written(client, layout, shards=3)
        for index in range(3):
            client.store.put(layout.part(index), b'{"id":"x","input":"a","output":1}\n' * 2)
        run = client.run(prefix)
        assert run.resume() == 0
        ended = run.wait(timeout=20)
        assert (ended.state, ended.items) == ("succeeded", 6)
        run.join_planner()
        for bitmap in ("items", "failed", "parts"):
            assert client.redis.ttl(run_key(run.id, bitmap)) > 0  # type: ignore[operator]

    def test_an_object_that_is_named_like_a_part_of_a_shard_beyond_the_run_is_none(
        self, client: Client, prefix: str
    ) -> None:
        run = client.map(TEXTS, ["a", "b"], output=prefix, shard_size=1)
        run.join_planner()
        client.store.put(RunLayout.at(prefix).part(1 << 31), b'{"id":"x","input":"a","output":1}\n')
        client.redis.flushall()
        assert run.resume() == 2
        run.join_planner()
        assert client.redis.strlen(run_key(run.id, "parts")) <= 1


class TestResumePoint:
    def test_it_costs_one_read_however_many_shards_there_are(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layout = RunLayout.at(prefix)
        write_shards(client, layout, 200)
        reads = [counted(monkeypatch, name) for name in ("get", "lines", "start")]
        planner = Planner(client, layout, plan(), None)
        planner.prepare()
        assert (planner.shards, planner.items, planner.continued) == (200, 400, True)
        assert sum(map(len, reads)) == 1


class TestBacklog:
    def test_what_redis_said_is_taken_for_a_while_where_there_is_room(self, client: Client) -> None:
        now, looks = 100.0, []
        backlog = Backlog(client, RunLayout.at("s3://pipefleet/none"), plan(), patience(), clock=lambda: now)
        backlog.begin()
        look = backlog._look
        backlog._look = lambda: looks.append(now) or look()  # type: ignore[method-assign, func-returns-value]
        assert backlog.room(0) == 2000
        assert backlog.room(5) == 1995
        assert len(looks) == 1
        now += 1.0
        assert backlog.room(5) == 1995
        assert len(looks) == 2
        assert backlog.room(2000) == 0
        assert backlog.room(2000) == 0
        assert len(looks) == 4

    def test_a_fleet_that_stands_still_with_all_its_shards_is_left_alone(
        self, bounded: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 100.0
        layout = RunLayout.at("s3://pipefleet/none")
        backlog = Backlog(bounded, layout, plan(), patience(), clock=lambda: now)
        backlog.begin()
        bounded.publish([shard_message(plan(), layout, index, index, 1) for index in range(4)], QUEUE, Priority.LOW)
        monkeypatch.setattr(backlog, "find", lambda _: pytest.fail("everything is compared"))
        assert backlog.room(4) == 0
        now += 3600.0
        assert backlog.room(4) == 0


def patience() -> Patience:
    return Patience(threading.Event())


def counted(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """The URIs that a method of ObjectStore is called with for shards, from now on."""
    calls: list[str] = []
    whole: Callable[..., Any] = getattr(ObjectStore, method)

    def call(self: ObjectStore, uri: str, *args: Any, **kwargs: Any) -> Any:
        if "/_run/shards/" in uri:
            calls.append(uri)
        return whole(self, uri, *args, **kwargs)

    monkeypatch.setattr(ObjectStore, method, call)
    return calls


def write_shards(client: Client, layout: RunLayout, shards: int) -> None:
    """Shards of two items each, as a planner writes them."""
    for index in range(shards):
        lines = [encode_shard_line(2 * index + one, JobItem(str(2 * index + one), "text")) for one in range(2)]
        client.store.put(layout.shard(index), ("\n".join(lines) + "\n").encode())


def written(client: Client, layout: RunLayout, *, shards: int) -> RunPlan:
    """A run that is planned to its end, of which Redis knows nothing."""
    import json

    write_shards(client, layout, shards)
    ended = plan(id=f"run{shards}", shards=shards, items=2 * shards)
    client.store.put(layout.run, json.dumps(ended.to_json()).encode())
    return ended
