"""Redis at `maxmemory`: nothing new enters, and what is there is done by workers that need no memory for it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobState
from pipefleet.errors import PipefleetError, ServiceFullError
from pipefleet.fleet.announcements import announce_worker, announced_workers
from pipefleet.queues.dead_letters import file_dead_letter
from pipefleet.queues.keys import ledger_keys, run_key
from pipefleet.queues.looking import queue_depth
from pipefleet.settings import load_settings
from pipefleet_workers.fleet.doctor.redis_memory import check_memory, judge
from pipefleet_workers.fleet.scaling.service import Scaler
from pipefleet_workers.fleet.top.read import read_fleet
from pipefleet_workers.items import Encoded
from pipefleet_workers.observe.totals import read_done, read_items, record_done, record_items
from pipefleet_workers.results.reports import LITTLE, Reporter
from pipefleet_workers.storage.store import WorkerStore
from tests.nursery import TASK, Nursery, long_texts
from tests.servers import Server, distribution_redis, redis_6, until, valkey
from tests.unit.worker.results.test_reports import ending

JOBS = 300
TEXTS = 60
FULL = "is out of memory; raise its maxmemory, or let the workers catch up"
PROGRAMS = [one for one in (valkey(), distribution_redis(), redis_6()) if one is not None]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    one = Nursery(tmp_path_factory.mktemp("nursery"))
    yield one
    one.close()


@pytest.fixture(params=PROGRAMS, ids=["valkey", "distribution", "6.2"][: len(PROGRAMS)])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    one = Server(request.param, tmp_path)
    yield one
    one.kill()


def fill(redis: Redis) -> None:
    """Let the server be full, whatever it forgets."""
    redis.config_set("maxmemory", 1_000_000)  # it takes more without any data


def test_a_fresh_worker_drains_a_server_that_is_full(
    server: Server,
    nursery: Nursery,
    environment: dict[str, str],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[pools.default]\ntask = "{TASK}"\nmodel = "{nursery.model}"\n')
    ours = {"PIPEFLEET_REDIS_URL": server.url, "PIPEFLEET_FLEET": str(fleet)}
    for name, value in ours.items():
        monkeypatch.setenv(name, value)
    with Client(load_settings()) as client, server.client() as redis:
        jobs = [client.submit(TASK, text) for text in long_texts(JOBS)]
        run = client.map(TASK, long_texts(TEXTS), output=f"{prefix}run/", shard_size=10)
        run.join_planner()
        fill(redis)
        with pytest.raises(ServiceFullError, match=FULL):
            client.submit(TASK, "one more")
        pid = nursery.start({**environment, **ours})
        until(lambda: pid in nursery.codes or all(job.status().final for job in jobs), 60.0)
        assert pid not in nursery.codes, nursery.log(pid)
        assert [job.status() for job in jobs] == [JobState.SUCCEEDED] * JOBS
        assert all(job.result(timeout=10)[0]["score"] > 0 for job in jobs)
        ended = run.wait(timeout=60)
        assert (ended.state, ended.succeeded) == ("succeeded", TEXTS)
        keys = ledger_keys(run.plan.queue)
        until(lambda: not any(queue_depth(redis, run.plan.queue).values()))
        assert redis.exists(keys["dead_key"], keys["unreported_key"]) == 0
        redis.config_set("maxmemory", 0)
        assert client.submit(TASK, "room again").result(
            timeout=20
        )  # the worker has waited on lists that it may not wait on
        assert nursery.stop(pid) == 0


@pytest.fixture(params=PROGRAMS, ids=["valkey", "distribution", "6.2"][: len(PROGRAMS)], scope="module")
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has no byte left."""
    one = Server(request.param, tmp_path_factory.mktemp("full"))
    with one.client() as redis:
        redis.set("filler", "x" * 2_000_000)
        fill(redis)
    yield one
    one.kill()


@pytest.mark.parametrize("long", [False, True])
def test_a_full_server_keeps_short_results_and_the_place_of_long_ones(
    full: Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", full.url)
    settings = load_settings()
    text = "x" * (2 * LITTLE if long else 10)
    name = uuid.uuid4().hex
    with Client(settings) as client:
        reporter = Reporter(client.redis, WorkerStore(), settings, worker="worker")
        message, outcome = ending(name, Encoded(orjson.dumps(text)))
        assert reporter.start_many([message]) == [JobState.RUNNING]
        assert [one.state for one in reporter.finish_many([(message, outcome)])] == [JobState.SUCCEEDED]  # type: ignore[union-attr]
        record = client.job(name).record()
        assert (record.output is None, record.output_ref is not None) == (long, long)
        assert client.job(name).result(timeout=20) == text


def test_a_run_is_cancelled_on_a_full_server(
    full: Server, environment: dict[str, str], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", full.url)
    with Client(load_settings()) as client, full.client() as redis:
        redis.config_set("maxmemory", 0)
        run = client.map("text-classification", ["one", "two"], output=f"{prefix}{uuid.uuid4().hex}/")
        run.join_planner()
        fill(redis)
        run.cancel()
        assert run.progress().state == "cancelled"
        assert redis.hget(run_key(run.id), "cancelled") == b"1"


def test_an_item_that_kills_workers_has_its_dead_letter_on_a_full_server(full: Server) -> None:
    queue = f"pipefleet.{uuid.uuid4().hex}"
    with full.client() as redis:
        for count in (1, 2):
            file_dead_letter(redis, queue, message="{}", reason="it kills")
            assert redis.llen(ledger_keys(queue)["dead_key"]) == count


def test_scaler_and_views_of_a_full_server_go_on(
    full: Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", full.url)
    with Client(load_settings()) as client:
        scaler = Scaler(client.fleet, client.settings, cold_start=1.0)
        assert set(scaler.tick()) == set(client.fleet.pools)
        assert read_fleet(client).pools
        for _ in range(2):
            record_done(client.redis, "texts", cost=1.0, seconds=1.0)
            record_items(client.redis, "texts", items=1)
        announce_worker(client.redis, "worker", {"pool": "texts"}, seconds=60)
        assert "worker" in announced_workers(client.redis)
        assert (read_items(client.redis, "texts").items, read_done(client.redis, "texts").cost) == (2, 2.0)


def test_doctor_warns_of_a_server_that_is_full(
    full: Server, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", full.url)
    with pytest.raises(PipefleetError, match="no new work is taken until workers have caught up"):
        check_memory(load_settings())


@pytest.mark.parametrize(
    ("used", "most", "policy", "words"),
    [
        (80, 100, "noeviction", "soon no new work"),
        (100, 100, "noeviction", "no new work is taken until"),
        (1, 0, "allkeys-lru", "drops whole queues"),
        (1, 100, "volatile-lru", "drops results and the progress"),
    ],
)
def test_doctor_says_what_a_server_will_do_when_it_is_full(used: int, most: int, policy: str, words: str) -> None:
    with pytest.raises(PipefleetError, match=words):
        judge(used, most, policy)


def test_doctor_tells_the_memory_of_a_server_that_has_room() -> None:
    assert judge(790_000_000, 1_000_000_000, "noeviction") == "790.0 MB of 1.0 GB used (79%)"
    assert judge(2_500_000_000, 0, "noeviction") == "2.5 GB used, no maxmemory"
