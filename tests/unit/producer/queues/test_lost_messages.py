"""Runs of which Redis keeps everything but their messages: they have stopped, and every client says so."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from redis import Redis

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.errors import RunError
from pipefleet.queues import lost_messages
from pipefleet.queues.celery import celery_app
from pipefleet.queues.keys import ARRIVING, base_queue, ledger_keys, queue_lists, run_key
from pipefleet.queues.lost_messages import GRACE_SECONDS, LOOK_SECONDS, LostMessages
from pipefleet.runs.run import Run
from tests.unit.shard_worker import ShardWorker

TEXTS = "text-classification"
Lose = Callable[[Client, Run], object]


def evict(client: Client, run: Run) -> None:
    client.redis.delete(*queue_lists(run.plan.queue))


def trim(client: Client, run: Run) -> None:
    for name in queue_lists(run.plan.queue):
        client.redis.ltrim(name, 0, 0)


def purge(client: Client, run: Run) -> None:
    with celery_app(client.settings).connection_for_write() as connection:
        connection.default_channel.queue_purge(run.plan.queue)


@pytest.fixture
def run(client: Client, prefix: str) -> Run:
    one = client.map(TEXTS, ["a", "b", "c", "d"], output=prefix, shard_size=1)
    one.join_planner()
    return one


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_messages, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(lost_messages, "LOOK_SECONDS", 0.1)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(("lose", "lost"), [(evict, 4), (trim, 3), (purge, 4)])
def test_who_waits_or_asks_is_told_and_resume_goes_on(
    client: Client, prefix: str, run: Run, capsys: pytest.CaptureFixture[str], lose: Lose, lost: int
) -> None:
    lose(client, run)
    with pytest.raises(RunError, match=rf"has stopped: at least {lost} shards are neither done.*`pipefleet resume"):
        run.wait(timeout=20)
    assert main(["status", prefix, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "stopped"
    assert run.resume() == lost
    run.join_planner()
    assert main(["status", prefix, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


@pytest.mark.usefixtures("soon")
def test_parts_that_a_failover_forgot_are_noted_again(client: Client, prefix: str, run: Run) -> None:
    worker = ShardWorker(client, run.plan.queue)
    for text in worker.take().values():
        worker.do(text, bad=[2])
    for file in ("_SUCCESS", "_failed.jsonl"):
        client.store.delete(f"{prefix}{file}")
    key = run_key(run.id)
    client.redis.setbit(f"{key}:parts", 1, 0)
    client.redis.setbit(f"{key}:items", 2, 0)
    client.redis.setbit(f"{key}:failed", 2, 0)
    assert run.progress().state == "running"
    ended = run.wait(timeout=20)
    assert (ended.state, ended.succeeded, ended.failed) == ("partial", 3, 1)


class TestLosses:
    @pytest.fixture
    def clock(self) -> list[float]:
        return [100.0]

    @pytest.fixture
    def seen(self, client: Client, clock: list[float]) -> LostMessages:
        return LostMessages(client.redis, client.settings.redis_url, monotonic=lambda: clock[0])

    def later(self, seen: LostMessages, run: Run, clock: list[float], seconds: float = GRACE_SECONDS) -> str | None:
        clock[0] += seconds
        return seen.why(run.plan)

    def test_nothing_is_lost_while_messages_wait_or_are_with_workers(
        self, redis: Redis, run: Run, seen: LostMessages, clock: list[float]
    ) -> None:
        queue = next(name for name in queue_lists(run.plan.queue) if redis.llen(name))
        keys = ledger_keys(run.plan.queue)
        redis.hset(keys["unacked_key"], "tag", redis.rpop(queue))  # type: ignore[arg-type]
        redis.lpush(keys["unreported_key"], redis.rpop(queue))  # type: ignore[arg-type]
        redis.lmove(queue, queue + ARRIVING)
        redis.lmove(queue, base_queue(run.plan.queue))
        assert self.later(seen, run, clock) is None
        assert not seen.suspected(run.id)
        assert self.later(seen, run, clock) is None
        redis.hdel(keys["unacked_key"], "tag")
        assert self.later(seen, run, clock) is None
        assert seen.suspected(run.id)
        assert str(self.later(seen, run, clock)).startswith("1 shard is neither done nor queued")
        assert seen.suspected(run.id)  # a caller that was told nothing a moment before looks once more

    def test_it_is_certain_only_when_nothing_of_the_run_ends_meanwhile(
        self, redis: Redis, run: Run, seen: LostMessages, clock: list[float]
    ) -> None:
        redis.delete(*queue_lists(run.plan.queue))
        for index in range(3):
            assert self.later(seen, run, clock, GRACE_SECONDS - LOOK_SECONDS) is None
            redis.setbit(run_key(run.id, "parts"), index, 1)
        assert self.later(seen, run, clock) is None
        assert self.later(seen, run, clock) is not None

    def test_a_client_that_queues_the_rest_of_the_run_has_not_lost_it(
        self, redis: Redis, run: Run, seen: LostMessages, clock: list[float]
    ) -> None:
        redis.delete(*queue_lists(run.plan.queue))
        redis.set(run_key(run.id, "planner"), "4 4")
        assert [self.later(seen, run, clock) for _ in range(3)] == [None] * 3

    def test_who_may_not_count_is_told_nothing(
        self, redis: Redis, run: Run, seen: LostMessages, clock: list[float]
    ) -> None:
        redis.delete(*queue_lists(run.plan.queue))
        redis.set(ledger_keys(run.plan.queue)["unacked_key"], "of another type")
        assert [self.later(seen, run, clock) for _ in range(3)] == [None] * 3
