"""What is said of a queue that nobody serves, from what workers and the scaler leave in Redis."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobMessage, Priority
from pipefleet.errors import JobCancelledError, ResultTimeoutError
from pipefleet.fleet.pools import Pool
from pipefleet.fleet.routing import revision_queue
from pipefleet.jobs.job import Job
from pipefleet.pipelines.fleet_pipeline import pipeline
from pipefleet.queues.celery import push_job
from pipefleet.queues.keys import POOLS_KEY, WORKERS_KEY, ledger_keys, scaler_key
from pipefleet.queues.looking import queued_ids
from pipefleet.queues.revision_notes import note_revision
from pipefleet.waiting.lookout import LOOK_SECONDS, SAY_SECONDS, Lookout, why_waiting
from tests.unit.conftest import eventually

TASK = "text-classification"
QUEUE = f"pipefleet.{TASK}"
NAMED = f"{QUEUE}.reviews"


def now(redis: Redis) -> float:
    seconds, micros = redis.time()  # type: ignore[misc]
    return float(seconds) + micros / 1e6


def announce(
    redis: Redis,
    name: str,
    *,
    seconds: float,
    pool: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """A worker of pool `name` whose entry ends in `seconds`, and its pool; more of both in `facts` and `pool`."""
    until = now(redis) + seconds
    fields = {"task": TASK, "model": "org/a", "revision": "1", "queue": QUEUE, **(pool or {})}
    redis.hset(POOLS_KEY, name, json.dumps({"pool": fields, "until": until}))
    redis.hset(WORKERS_KEY, f"{name}@host-1", json.dumps({"pool": name, "until": until, **(facts or {})}))


def test_a_queue_with_a_live_worker_needs_no_word(redis: Redis) -> None:
    announce(redis, "texts", seconds=60)
    assert why_waiting(redis, QUEUE) is None


def test_a_worker_that_was_lost_is_told_with_its_pool_model_and_what_waits(redis: Redis) -> None:
    announce(redis, "texts", seconds=-1)
    for number in range(2):
        push_job(redis, JobMessage(f"j{number}", TASK), QUEUE, Priority.NORMAL)
    assert why_waiting(redis, QUEUE) == (
        f"no worker serves {QUEUE} (model org/a@1) now; start one with `pipefleet worker --pool texts`; 2 jobs wait"
    )


@pytest.mark.parametrize(("queue", "start"), [(QUEUE, "`pipefleet up`"), (NAMED, "`pipefleet worker --pool reviews`")])
def test_of_a_queue_that_nobody_ever_served_the_name_is_told(redis: Redis, queue: str, start: str) -> None:
    assert why_waiting(redis, queue) == f"no worker serves {queue} now; start one with {start}; 0 jobs wait"


def test_a_worker_of_another_queue_does_not_count(redis: Redis) -> None:
    announce(redis, "texts", seconds=60)
    assert why_waiting(redis, NAMED) is not None


def test_a_worker_names_the_queue_of_its_revision_and_serves_that_of_its_pool_too(redis: Redis) -> None:
    announce(redis, "texts", seconds=60, facts={"queue": f"{QUEUE}@0a1b2c3d"})
    assert why_waiting(redis, f"{QUEUE}@0a1b2c3d") is None
    assert why_waiting(redis, QUEUE) is None


def test_a_revision_that_nobody_serves_is_told_although_the_pool_has_workers(redis: Redis) -> None:
    announce(redis, "texts", seconds=60, facts={"queue": f"{QUEUE}@0a1b2c3d"})
    redis.hset(ledger_keys(QUEUE)["unacked_key"], "held", "by a worker of another revision")
    push_job(redis, JobMessage("j", TASK), f"{QUEUE}@ffffffff", Priority.NORMAL)
    pool = Pool("texts", TASK, "org/a", "0")
    assert why_waiting(redis, f"{QUEUE}@ffffffff", pool=pool) == (
        f"no worker serves {QUEUE}@ffffffff (model org/a@0) now; start one with `pipefleet worker --pool texts`; 1 job waits"
    )


def test_an_entry_of_a_revision_tells_the_name_of_its_pool(redis: Redis) -> None:
    announce(redis, "texts@0a1b2c3d", seconds=-1, pool={"revision_queue": f"{QUEUE}@0a1b2c3d"})
    assert "(model org/a@1) now; start one with `pipefleet worker --pool texts`" in str(
        why_waiting(redis, f"{QUEUE}@0a1b2c3d")
    )


def test_of_a_revision_that_is_not_its_pools_own_the_command_names_the_model(redis: Redis) -> None:
    queue = f"{QUEUE}@ffffffff"
    announce(redis, "texts", seconds=60, facts={"queue": f"{QUEUE}@0a1b2c3d"})
    redis.set(scaler_key("texts"), json.dumps({"state": {"workers": 1, "at": now(redis)}}))  # for the pool's own
    note_revision(redis, queue, "org/a", "0")
    assert f"start one with `pipefleet worker --task {TASK} --model org/a --revision 0`" in str(
        why_waiting(redis, queue)
    )
    retired = Pool("texts", TASK, "org/a", "0", generation=1)
    told = str(why_waiting(redis, queue, pool=retired))
    assert "start one with `pipefleet worker --pool texts --model org/a --revision 0`" in told


def test_what_a_lost_worker_held_waits_too(redis: Redis) -> None:
    redis.hset(ledger_keys(QUEUE)["unacked_key"], "held", "by nobody")
    assert str(why_waiting(redis, QUEUE)).endswith("1 job waits")


@pytest.mark.parametrize(("workers", "age", "said"), [(1, 5, True), (0, 5, False), (1, 1000, False)])
def test_a_worker_that_the_scaler_wants_is_on_its_way(redis: Redis, workers: int, age: float, said: bool) -> None:
    state = {"state": {"workers": workers, "at": now(redis) - age}}
    redis.set(scaler_key("reviews"), json.dumps(state))
    assert ("the scaler has asked for one" in str(why_waiting(redis, NAMED))) is said


def test_entries_that_are_not_ours_are_passed_over(redis: Redis) -> None:
    redis.hset(WORKERS_KEY, mapping={"a": "no json", "b": "[]", "c": '{"until": "soon"}', "d": '{"until": 9e12}'})
    redis.hset(POOLS_KEY, mapping={"a": "[]", "b": '{"pool": 1}'})
    assert why_waiting(redis, QUEUE) is not None


class TestLookout:
    """What the logger `pipefleet` is told while somebody waits."""

    @pytest.fixture
    def clock(self) -> list[float]:
        return [100.0]

    @pytest.fixture
    def lookout(self, redis: Redis, clock: list[float]) -> Lookout:
        return Lookout(redis, monotonic=lambda: clock[0])

    def test_it_warns_once_and_again_while_it_lasts(
        self, lookout: Lookout, clock: list[float], caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(int(SAY_SECONDS)):
            lookout.look(QUEUE)
            clock[0] += 0.9
        assert len(caplog.records) == 1
        clock[0] += SAY_SECONDS / 5
        lookout.look(QUEUE)
        assert [(one.name, one.levelname) for one in caplog.records] == [("pipefleet", "WARNING")] * 2
        assert lookout.known(QUEUE) == caplog.messages[-1]

    def test_it_is_silent_when_a_worker_comes_and_warns_at_once_when_that_is_lost(
        self, lookout: Lookout, clock: list[float], redis: Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        for seconds, known in ((-1, True), (60, False), (-1, True)):
            announce(redis, "texts", seconds=seconds)
            lookout.look(QUEUE)
            assert (lookout.known(QUEUE) is not None) is known
            clock[0] += LOOK_SECONDS
        assert len(caplog.records) == 2

    def test_it_asks_redis_now_and_then_only(self, lookout: Lookout, clock: list[float], redis: Redis) -> None:
        announce(redis, "texts", seconds=60)
        lookout.look(QUEUE)
        redis.flushall()
        lookout.look(QUEUE)
        assert lookout.known(QUEUE) is None
        clock[0] += LOOK_SECONDS
        lookout.look(QUEUE)
        assert lookout.known(QUEUE) is not None

    def test_it_tells_the_pool_that_the_client_named(self, lookout: Lookout) -> None:
        lookout.name(QUEUE, Pool("mine", TASK, "org/a", "1"))
        lookout.look(QUEUE)
        assert "(model org/a@1) now; start one with `pipefleet worker --pool mine`" in str(lookout.known(QUEUE))

    def test_what_cannot_be_read_hurts_nobody(self, lookout: Lookout, redis: Redis) -> None:
        redis.set(WORKERS_KEY, "no hash")
        lookout.look(QUEUE)
        assert lookout.known(QUEUE) is None


class TestWaiting:
    """Whoever waits for a job is told, however it is waited for."""

    @pytest.fixture
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipefleet.waiting.watcher.SWEEP_SECONDS", 0.05)
        monkeypatch.setattr("pipefleet.waiting.watcher.LOOK_AFTER_SECONDS", 0.0)

    def told(self, client: Client, caplog: pytest.LogCaptureFixture, wait: Callable[[], object]) -> float:
        """Seconds until a waiting was told of; then it ends."""
        begin = time.monotonic()
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(wait)
            assert eventually(lambda: "no worker serves" in caplog.text)
            seconds = time.monotonic() - begin
            for job_id in queued_ids(client.redis, QUEUE):
                client.job(job_id).cancel()
            assert isinstance(waiting.exception(30), JobCancelledError)
        return seconds

    def test_by_the_result_of_a_job_within_seconds(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        job = client.submit(TASK, "a")
        assert self.told(client, caplog, job.result) < 6.0  # 3, and more on a busy machine

    @pytest.mark.usefixtures("soon")
    def test_by_a_call(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        self.told(client, caplog, lambda: pipeline(TASK, client=client)(["a", "b"]))

    @pytest.mark.usefixtures("soon")
    def test_by_a_call_that_ends_in_its_error(self, client: Client) -> None:
        with pytest.raises(ResultTimeoutError, match="was cancelled: no worker serves"):
            pipeline(TASK, client=client)("a", timeout=1.5)

    @pytest.mark.usefixtures("soon")
    def test_by_await(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        async def wait(job: Job) -> Any:
            return await job

        job = client.submit(TASK, "a")
        self.told(client, caplog, lambda: asyncio.run(wait(job)))

    @pytest.mark.usefixtures("soon")
    def test_by_a_job_that_another_client_submitted(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        job_id = client.submit(TASK, "a").id
        with Client() as other:
            self.told(client, caplog, other.job(job_id).result)

    @pytest.mark.usefixtures("soon")
    def test_who_is_served_is_told_nothing(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        announce(client.redis, "texts", seconds=60, facts={"queue": revision_queue(QUEUE, "/models/texts", None)})
        with pytest.raises(ResultTimeoutError, match=r"it goes on$"):
            client.submit(TASK, "a").result(1.0)
        assert [one for one in caplog.records if one.name == "pipefleet"] == []
