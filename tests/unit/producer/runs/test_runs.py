"""Runs from the producer's side when things go wrong: failed calls, outages, cancelled planning, a Redis that forgot."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobMessage, Priority
from pipefleet.contract.shards import decode_shard_line, shard_id
from pipefleet.errors import PipefleetError, RunError, ServiceUnavailableError
from pipefleet.patience import Patience
from pipefleet.queues.keys import queue_lists, run_key
from pipefleet.queues.looking import queue_depth
from pipefleet.runs.planner import Planner, planner_alive
from pipefleet.runs.run import Run
from pipefleet.storage.store import ObjectStore
from tests.unit.conftest import eventually

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"


def inputs(client: Client, uri: str) -> list[Any]:
    """The inputs in all shards of a run, in order."""
    layout = RunLayout.at(uri)
    return [
        decode_shard_line(line)[1].inputs
        for index, _ in enumerate(client.store.list(layout.shards))
        for line in client.store.lines(layout.shard(index))
    ]


def waiting(client: Client) -> int:
    return queue_depth(client.redis, QUEUE)["low"]


def finish_parts(client: Client, run: Run, parts: Iterable[int]) -> None:
    """What a worker does for a shard, without its look at the totals."""
    for index in parts:
        client.store.put(RunLayout.at(run.uri).part(index), b'{"id":"0","input":"a","output":1}\n')
        client.redis.setbit(run_key(run.id, "parts"), index, 1)


class Outage:
    """Makes the first `times` calls of a method fail as if its service were away, with the write done or not."""

    def __init__(self, times: int, *, done: bool = False) -> None:
        self.left, self.done, self.calls = times, done, 0

    def of(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.left and self.done:
                whole(*args, **kwargs)
            if self.left:
                self.left -= 1
                raise ServiceUnavailableError("away")
            return whole(*args, **kwargs)

        return call


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outages are waited for without the waiting."""
    monkeypatch.setattr("pipefleet.patience.pause", lambda *_, **__: 0.0)


class TestFailedCalls:
    def test_nothing_is_written_while_redis_is_away(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client.check_fleet()  # which writes the fleet's own object where there is none
        monkeypatch.setattr(client.redis, "ping", Outage(1).of(client.redis.ping))
        monkeypatch.setattr(client.store, "put_new", lambda *_, **__: pytest.fail("something is written"))
        with pytest.raises(ServiceUnavailableError):
            client.map(TEXTS, ["wrong"] * 5, output=prefix)

    def test_a_shard_that_could_not_be_queued_is_not_taken_by_the_next_run(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "publish", Outage(1).of(client.publish))
        with pytest.raises(ServiceUnavailableError):
            client.map(TEXTS, ["wrong"] * 5, output=prefix)
        assert list(client.store.list(prefix)) == []
        client.map(TEXTS, list("abcdef"), output=prefix).join_planner()
        assert inputs(client, prefix) == list("abcdef")

    @pytest.mark.parametrize("name", ["_run/shards/00000.jsonl", "part-00000.jsonl", "_SUCCESS", "_run/cancelled"])
    def test_what_is_left_of_another_run_is_refused(self, client: Client, prefix: str, name: str) -> None:
        client.store.put(prefix + name, b'{"position":0,"id":"0","inputs":"wrong"}\n')
        client.store.put(prefix + "part-of-speech.jsonl", b"the user's own")
        with pytest.raises(RunError, match=f"{name} is left of another run"):
            client.map(TEXTS, ["a"], output=prefix)
        assert client.store.head(RunLayout.at(prefix).plan) is None
        client.store.delete(prefix + name)
        client.map(TEXTS, ["a"], output=prefix).join_planner()

    def test_a_source_that_raises_at_once_leaves_nothing_behind(self, client: Client, prefix: str) -> None:
        def broken() -> Iterator[str]:
            raise ValueError("x")
            yield

        with pytest.raises(RunError, match="the source raised ValueError: x"):
            client.map(TEXTS, broken(), output=prefix)
        assert list(client.store.list(prefix)) == []

    def test_a_call_that_comes_second_removes_nothing_of_the_first(self, client: Client, prefix: str) -> None:
        def slow() -> Iterator[str]:
            with pytest.raises(RunError, match="the source raised ValueError"):
                client.map(TEXTS, (int("x") for _ in "x"), output=prefix)
            yield "a"

        run = client.map(TEXTS, slow(), output=prefix)
        run.join_planner()
        assert client.store.head(RunLayout.at(prefix).plan) is not None


class TestPlanning:
    def test_a_full_shard_is_queued_though_the_next_item_keeps_waiting(self, client: Client, prefix: str) -> None:
        hold = threading.Event()

        def source() -> Iterator[str]:
            yield from "abcde"
            hold.wait(60)

        run = client.map(TEXTS, source(), output=prefix, shard_size=5)  # returns although the source has not ended
        assert waiting(client) == 1
        assert planner_alive(client, run.plan) is not None
        hold.set()
        run.join_planner()
        assert run.plan.items == 5

    def test_a_run_whose_parts_were_faster_than_its_totals_ends_without_anybody_looking(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = Client.publish

        def publish(self: Client, messages: Iterable[JobMessage], queue: str, priority: Priority) -> None:
            for message in messages:
                whole(self, [message], queue, priority)
                assert message.shard is not None
                finish_parts(self, self.run(message.shard.run_uri), [message.shard.index])

        monkeypatch.setattr(Client, "publish", publish)
        client.map(TEXTS, ["a"], output=prefix).join_planner()
        assert client.store.head(RunLayout.at(prefix).success) is not None

    @pytest.mark.usefixtures("brief")
    @pytest.mark.parametrize("done", [False, True])
    @pytest.mark.parametrize("what", ["shard", "queue", "source", "totals"])
    def test_an_outage_does_not_end_it(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch, what: str, done: bool
    ) -> None:
        for number in range(12):
            client.store.put(f"{prefix}in/{number:02d}.txt", b"x")
        go, outage = threading.Event(), Outage(3, done=done)
        step = Planner.step
        monkeypatch.setattr(Planner, "step", lambda self: (not self.shards or go.wait(60)) and step(self))
        page = ObjectStore._page
        monkeypatch.setattr(ObjectStore, "_page", lambda self, request: page(self, {**request, "MaxKeys": 2}))
        run = client.map(TEXTS, prefix + "in/", output=prefix + "out/", shard_size=5)
        if what == "shard":
            monkeypatch.setattr(client.store, "put_new", outage.of(client.store.put_new))
        elif what == "queue":
            monkeypatch.setattr(client, "publish", outage.of(client.publish))
        elif what == "source":
            monkeypatch.setattr(ObjectStore, "_page", outage.of(ObjectStore._page))
        else:
            monkeypatch.setattr("pipefleet.runs.planner.remember_totals", outage.of(broker_totals))
        go.set()
        run.join_planner()
        assert outage.calls > 3
        assert (run.progress().state, run.plan.items, run.plan.shards) == ("running", 12, 3)
        assert [one["$ref"][-6:] for one in inputs(client, run.uri)] == [f"{number:02d}.txt" for number in range(12)]

    @pytest.mark.usefixtures("brief")
    def test_an_outage_that_lasts_ends_it_with_its_error(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.runs.planner.PATIENCE_SECONDS", 0.1)
        step = Planner.step
        outage = Outage(10**9)

        def away(self: Planner) -> bool:
            if self.shards:
                monkeypatch.setattr(client, "publish", outage.of(client.publish))
            return step(self)

        monkeypatch.setattr(Planner, "step", away)
        run = client.map(TEXTS, list("abcd"), output=prefix, shard_size=2)
        run.join_planner()
        with pytest.raises(ServiceUnavailableError, match="away"):
            run.wait(timeout=20)
        assert outage.calls > 2


def broker_totals(redis: Any, plan: Any, *, ttl: float) -> None:
    redis.hset(run_key(plan.id), mapping={"shards": plan.shards, "items": plan.items})


@pytest.mark.usefixtures("brief")
def test_patience_is_for_what_may_mend_itself_and_ends_when_told() -> None:
    stopped = threading.Event()
    outage = Outage(5)
    assert Patience(stopped, seconds=60).call(outage.of(lambda: "done")) == "done"
    assert outage.calls == 6
    with pytest.raises(ServiceUnavailableError):
        Patience(stopped).call(Outage(1).of(lambda: "done"))
    wrong = Outage(0)
    with pytest.raises(PipefleetError, match="for good"):
        Patience(stopped, seconds=60).call(wrong.of(lambda: (_ for _ in ()).throw(PipefleetError("for good"))))
    assert wrong.calls == 1
    stopped.set()
    outage = Outage(5)
    with pytest.raises(ServiceUnavailableError):
        Patience(stopped, seconds=60).call(outage.of(lambda: "done"))
    assert outage.calls == 1


class Endless:
    """Texts without end; after the first `free` ones, as many as are asked for."""

    def __init__(self, free: int, total: int) -> None:
        self.more, self.free, self.total, self.taken = threading.Semaphore(0), free, total, 0

    def __iter__(self) -> Iterator[str]:
        for number in itertools.islice(itertools.count(), self.total):
            if number >= self.free:
                assert self.more.acquire(timeout=60)
            self.taken = number + 1
            yield f"text {number}"


class TestCancel:
    def test_it_stops_planning_and_resume_goes_on_with_the_same_source(
        self, client: Client, prefix: str, queued: Callable[[str], list[str]]
    ) -> None:
        source = Endless(free=12, total=100)
        run = client.map(TEXTS, source, output=prefix, shard_size=5)
        assert eventually(lambda: source.taken == 12)
        run.cancel()
        for _ in range(3):  # it notices with the shard that it is at
            source.more.release()
        run.join_planner()
        assert source.taken == 15
        assert run.progress().state == "cancelled"
        client.redis.delete(*queue_lists(run.plan.queue))  # what workers do with the messages of a cancelled run
        for _ in range(85):
            source.more.release()
        assert run.resume() >= 3
        run.join_planner()
        assert (run.progress().state, run.plan.items, run.plan.shards) == ("running", 100, 20)
        assert inputs(client, prefix) == [f"text {number}" for number in range(100)]
        assert set(queued(QUEUE)) == {shard_id(run.id, index) for index in range(20)}

    def test_it_is_known_from_the_store_when_redis_forgot(self, client: Client, prefix: str) -> None:
        run = client.map(TEXTS, ["a"], output=prefix)
        run.join_planner()
        run.cancel()
        assert client.redis.ttl(run_key(run.id)) > 0  # type: ignore[operator]
        client.redis.flushall()
        reopened = client.run(prefix)
        assert reopened.progress().state == "cancelled"
        reopened.resume()
        assert reopened.progress().state == "running"

    def test_a_block_that_ends_with_an_error_does_not_plan_on(self, environment: dict[str, str], prefix: str) -> None:
        source = Endless(free=5, total=1000)
        runs = []

        def block() -> None:
            with Client() as client:
                runs.append(client.map(TEXTS, source, output=prefix, shard_size=5))
                threading.Timer(0.1, source.more.release, [5]).start()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            block()
        assert not runs[0].planning
        assert source.taken <= 10

    def test_a_client_keeps_only_the_runs_that_it_plans(self, client: Client, prefix: str) -> None:
        for number in range(5):
            client.map(TEXTS, ["a"], output=f"{prefix}{number}/").join_planner()
        assert len(client._planning) == 1


class TestProgress:
    def test_the_store_is_asked_only_now_and_then(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = client.map(TEXTS, [f"text {number}" for number in range(4)], output=prefix, shard_size=2)
        run.join_planner()
        assert run.progress().state == "running"
        with monkeypatch.context() as patch:
            for name in ("get", "head", "list"):
                patch.setattr(client.store, name, lambda *_, **__: pytest.fail("asks the store"))
            for _ in range(5):
                assert run.progress().state == "running"
        finish_parts(client, run, range(2))
        assert run.progress().state == "succeeded"  # as soon as Redis has every part

    def test_the_end_is_found_in_the_store_when_redis_forgot(
        self, client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipefleet.runs.run.LOOK_AT_STORE_SECONDS", 0.2)
        run = client.map(TEXTS, ["a"], output=prefix)
        run.join_planner()
        assert run.progress().state == "running"
        finish_parts(client, run, [0])
        assert client.run(prefix).progress().state == "succeeded"
        client.redis.flushall()
        assert run.wait(timeout=20).state == "succeeded"


def test_resume_does_not_wait_for_ever_for_another_planner(
    client: Client, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipefleet.runs.resume.TAKE_OVER_SECONDS", 0.3)
    source = Endless(free=5, total=10)
    run = client.map(TEXTS, source, output=prefix, shard_size=5)
    with Client() as other, pytest.raises(RunError, match="another client plans the run"):
        other.run(prefix).resume()
    source.more.release(5)
    run.join_planner()
    assert run.plan.items == 10
