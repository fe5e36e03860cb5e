"""A fleet has one store: clients and workers with another one are told so before they queue or take anything."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet import cli
from pipefleet.client import Client
from pipefleet.contract.messages import CONTRACT_VERSION
from pipefleet.errors import (
    AccessDeniedError,
    FleetMismatchError,
    ObjectRefusedError,
    ServiceUnavailableError,
    UsageError,
)
from pipefleet.fleet import identity
from pipefleet.fleet.file import load_fleet
from pipefleet.fleet.identity import OBJECT, Identity, Membership
from pipefleet.queues.keys import FLEET_KEY
from pipefleet.queues.looking import queue_depth
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.doctor import store as doctor_store
from pipefleet_workers.fleet.doctor.check import Check
from pipefleet_workers.fleet.doctor.report import run_checks
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.worker import Worker
from tests.servers import free_port, moto_server
from tests.unit.conftest import eventually
from tests.unit.shard_worker import ShardWorker

TASK = "text-classification"
QUEUE = f"pipefleet.{TASK}"


@pytest.fixture
def settings(client: Client) -> Settings:
    """A fleet with a store of its own, of which Redis does not know yet."""
    return client.settings.model_copy(update={"store": f"s3://pipefleet/{uuid.uuid4().hex}/"})


@pytest.fixture
def member(redis: Redis, store: ObjectStore, settings: Settings) -> Membership:
    """A worker of the fleet, which has noted its store in Redis."""
    one = Membership(redis, store, settings)
    one.prove(works=True)
    return one


@pytest.fixture(scope="module")
def second_server() -> Iterator[str]:
    """Another S3 server with an empty bucket of the same name."""
    with moto_server() as url:
        yield url


@pytest.fixture
def elsewhere(client: Client, second_server: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ObjectStore]:
    """Makes the environment lead to the other server; returns its store."""

    def move() -> ObjectStore:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", second_server)
        found = ObjectStore()
        found.client.create_bucket(Bucket="pipefleet")
        return found

    return move


def noted(redis: Redis) -> Identity | None:
    return Identity.read(redis.get(FLEET_KEY))  # type: ignore[arg-type]


def waiting(redis: Redis) -> int:
    return sum(queue_depth(redis, QUEUE).values())


def other(settings: Settings) -> Settings:
    return settings.model_copy(update={"store": "s3://pipefleet/another/"})


class TestClients:
    def test_the_first_one_that_uses_the_store_notes_it_and_others_of_the_fleet_pass(
        self, redis: Redis, settings: Settings, prefix: str
    ) -> None:
        with Client(settings) as first:
            first.submit(TASK, "a text")
            assert noted(redis) is None
            first.map(TASK, ["a"], output=prefix)
        found = noted(redis)
        assert found is not None
        assert (found.store, found.contract) == (settings.store, CONTRACT_VERSION)
        with Client(settings) as second:
            second.submit(TASK, "a text", output=f"{prefix}result.json")
        assert noted(redis) == found

    @pytest.mark.parametrize("call", ["submit", "map", "resume", "publish"])
    def test_one_with_another_store_is_told_so_before_it_queues_anything(
        self, redis: Redis, settings: Settings, member: Membership, prefix: str, call: str
    ) -> None:
        with Client(settings) as good:
            run = good.map(TASK, ["a"], output=prefix)
        before = waiting(redis)
        with Client(other(settings)) as bad:
            calls: dict[str, Callable[[], object]] = {
                "submit": lambda: bad.submit(TASK, "a text"),
                "map": lambda: bad.map(TASK, ["a"], output=f"{prefix}more/"),
                "resume": lambda: bad.run(run.uri).resume(),
                "publish": lambda: bad.publish([], QUEUE, 3),  # type: ignore[arg-type]
            }
            with pytest.raises(FleetMismatchError) as caught:
                calls[call]()
            assert list(bad.store.list(f"{prefix}more/")) == []
        assert waiting(redis) == before
        told = str(caught.value)
        assert settings.store in told
        assert "s3://pipefleet/another/" in told
        assert "`pipefleet doctor --adopt-store`" in told
        assert (caught.value.exit_code, caught.value.retryable) == (2, False)

    def test_the_same_name_at_another_server_is_another_store(
        self,
        redis: Redis,
        settings: Settings,
        member: Membership,
        elsewhere: Callable[[], ObjectStore],
        second_server: str,
    ) -> None:
        elsewhere()
        with Client(settings) as bad:
            for call in (
                lambda: bad.submit(TASK, "s3://pipefleet/a.txt"),
                lambda: bad.map(TASK, ["a"], output="s3://pipefleet/out/"),
            ):
                with pytest.raises(FleetMismatchError, match=second_server):
                    call()
        assert waiting(redis) == 0

    def test_an_endpoint_may_have_two_names(
        self,
        redis: Redis,
        settings: Settings,
        member: Membership,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str],
    ) -> None:
        url = environment["AWS_ENDPOINT_URL_S3"]
        assert "127.0.0.1" in url
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url.replace("127.0.0.1", "localhost"))
        assert "is the store of this Redis's fleet" in Membership(redis, ObjectStore(), settings).prove()

    def test_it_asks_once(self, redis: Redis, settings: Settings, member: Membership, prefix: str) -> None:
        with Client(settings) as one:
            one.submit(TASK, "a text", output=f"{prefix}1")
            redis.config_resetstat()
            reads: list[str] = []
            one.store.get = reads.append  # type: ignore[method-assign,assignment]
            for index in range(20):
                one.submit(TASK, "a text", output=f"{prefix}{index}")
            statistics: Any = redis.info("commandstats")
        assert "cmdstat_get" not in statistics
        assert reads == []

    def test_an_outage_of_s3_does_not_keep_jobs_back_and_is_not_asked_about_at_each(
        self, redis: Redis, settings: Settings, member: Membership
    ) -> None:
        now, calls = [0.0], []

        class Away(ObjectStore):
            def get(self, uri: str) -> bytes:
                calls.append(uri)
                raise ServiceUnavailableError("away")

        one = Membership(redis, Away(), settings, clock=lambda: now[0])
        for now[0] in (0.0, 1.0, 59.0, 61.0, 62.0):
            one.check(uses_store=True)
        assert len(calls) == 2
        with pytest.raises(FleetMismatchError):
            Membership(redis, Away(), other(settings)).check(uses_store=True)

    def test_without_rights_at_the_store_the_uris_are_compared(
        self, redis: Redis, settings: Settings, member: Membership, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "compared with the fleet's by its URI alone" in Membership(redis, ObjectStore(), settings).prove()
        with pytest.raises(FleetMismatchError):
            Membership(redis, ObjectStore(), other(settings)).prove()

    def test_no_service_is_needed_to_make_a_client(self, settings: Settings) -> None:
        offline = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
        with Client(offline) as one:
            assert one.job("x").id == "x"


class TestIdentity:
    def test_an_emptied_redis_gets_it_again(
        self, redis: Redis, store: ObjectStore, settings: Settings, member: Membership
    ) -> None:
        before = noted(redis)
        redis.flushall()
        assert member.changed()
        Membership(redis, store, settings).prove(works=True)
        assert noted(redis) == before

    def test_who_comes_at_the_same_time_agrees(self, redis: Redis, settings: Settings) -> None:
        start, told = threading.Barrier(8), []

        def come() -> None:
            start.wait()
            told.append(Membership(redis, ObjectStore(), settings).prove())

        threads = [threading.Thread(target=come) for _ in range(8)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        assert len(told) == 8

    def test_an_object_that_expired_gets_its_id_back_where_the_endpoints_name_means_the_same_everywhere(
        self, redis: Redis, store: ObjectStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(identity, "endpoint", lambda: "https://s3.example.com")
        Membership(redis, store, settings).prove()
        before, uri = store.get(f"{settings.store}{OBJECT}"), f"{settings.store}{OBJECT}"
        store.delete(uri)
        Membership(redis, store, settings).prove()
        assert json.loads(store.get(uri))["id"] == json.loads(before)["id"]
        monkeypatch.setattr(identity, "endpoint", lambda: "http://127.0.0.1:9000")
        redis.delete(FLEET_KEY)
        Membership(redis, store, settings).prove()
        store.delete(uri)
        with pytest.raises(
            FleetMismatchError, match=r"its _fleet\.json has another id, so it was emptied or another server"
        ):
            Membership(redis, store, settings).prove()

    @pytest.mark.parametrize("error", [AccessDeniedError, ObjectRefusedError])
    def test_where_the_object_cannot_be_read_the_uris_decide(
        self, redis: Redis, store: ObjectStore, settings: Settings, member: Membership, error: type[Exception]
    ) -> None:
        def refuse(uri: str) -> bytes:
            raise error(f"{uri} is archived")

        store.get = refuse  # type: ignore[method-assign]
        assert "by its URI alone" in Membership(redis, store, settings).prove()
        with pytest.raises(FleetMismatchError, match=settings.store):
            Membership(redis, store, other(settings)).prove()

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b'{"id": 1}', b"\xff", b'{"id":"x","store":"s","endpoint":"e","contract":1e999}']
    )
    def test_garbage_in_redis_is_another_fleets(
        self, redis: Redis, store: ObjectStore, settings: Settings, content: bytes
    ) -> None:
        redis.set(FLEET_KEY, content)
        with pytest.raises(FleetMismatchError, match="adopt-store"):
            Membership(redis, store, settings).prove()

    def test_what_redis_says_is_shown_escaped(self, redis: Redis, store: ObjectStore, settings: Settings) -> None:
        redis.set(FLEET_KEY, Identity("x", "s3://a/\n\x1b[31m", "e", 1).write())
        with pytest.raises(FleetMismatchError) as caught:
            Membership(redis, store, settings).prove()
        assert str(caught.value).isprintable()

    def test_garbage_in_the_store_is_named(self, redis: Redis, store: ObjectStore, settings: Settings) -> None:
        store.put(f"{settings.store}{OBJECT}", b"[]")
        with pytest.raises(UsageError, match=f"{settings.store}{OBJECT} holds no id"):
            Membership(redis, store, settings).prove()

    def test_releases_that_do_not_understand_each_other(
        self, redis: Redis, store: ObjectStore, settings: Settings, member: Membership
    ) -> None:
        found = noted(redis)
        assert found is not None
        redis.set(FLEET_KEY, replace(found, contract=CONTRACT_VERSION + 1).write())
        Membership(redis, store, settings).prove()  # newer workers know older messages
        with pytest.raises(FleetMismatchError, match="this worker knows"):
            Membership(redis, store, settings).prove(works=True)
        redis.set(FLEET_KEY, replace(found, contract=CONTRACT_VERSION - 1).write())
        with pytest.raises(FleetMismatchError, match="upgrade the workers first"):
            Membership(redis, store, settings).prove()
        Membership(redis, store, settings).prove(works=True)
        assert noted(redis) == found


class TestWorkers:
    @pytest.fixture
    def worker(self, settings: Settings, bare_stack: Any) -> Callable[[Settings], Worker]:
        def make(settings: Settings) -> Worker:
            fleet = load_fleet(Path(bare_stack.environment()["PIPEFLEET_FLEET"]))
            return Worker(fleet, fleet.pool("texts"), settings, WorkerSettings(announce_seconds=0.01))

        return make

    def test_one_with_another_store_does_not_start(
        self, settings: Settings, member: Membership, worker: Callable[[Settings], Worker]
    ) -> None:
        with pytest.raises(FleetMismatchError, match="s3://pipefleet/another/"):
            worker(other(settings)).run()

    def test_a_worker_that_came_first_keeps_clients_with_another_store_away(
        self, redis: Redis, settings: Settings, worker: Callable[[Settings], Worker]
    ) -> None:
        worker(settings)._join_fleet()
        with Client(other(settings)) as bad, pytest.raises(FleetMismatchError, match=settings.store):
            bad.submit(TASK, "a text")

    def test_its_store_goes_before_one_that_a_client_alone_has_noted(
        self, redis: Redis, store: ObjectStore, settings: Settings, worker: Callable[[Settings], Worker]
    ) -> None:
        one = worker(settings)
        one._join_fleet()
        redis.flushall()
        with Client(other(settings)) as wrong:
            wrong.check_fleet()
        assert one._membership.changed()
        one._join_fleet()
        found = noted(redis)
        assert found is not None
        assert (found.store, one._membership.changed()) == (settings.store, False)
        with Client(other(settings)) as late, pytest.raises(FleetMismatchError, match=settings.store):
            late.submit(TASK, "a text")
        with pytest.raises(FleetMismatchError, match=settings.store):
            worker(other(settings))._join_fleet()

    def test_one_that_runs_drains_when_another_store_is_adopted(
        self, redis: Redis, store: ObjectStore, settings: Settings, worker: Callable[[Settings], Worker]
    ) -> None:
        one, told = worker(settings), threading.Event()
        before = signal.signal(signal.SIGTERM, lambda *_: told.set())
        try:
            one._join_fleet()
            thread = threading.Thread(target=one._stay_in_fleet, daemon=True)
            thread.start()
            redis.delete(FLEET_KEY)
            assert eventually(lambda: noted(redis) is not None)  # of a Redis that was emptied
            Membership(redis, store, other(settings)).adopt()
            assert eventually(told.is_set)
            thread.join(20)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert isinstance(one._refused, FleetMismatchError)

    def test_shards_that_a_strangers_worker_refused_end_their_run(
        self, redis: Redis, client: Client, prefix: str, elsewhere: Callable[[], ObjectStore]
    ) -> None:
        run = client.map(TASK, ["a", "b", "c"], output=prefix, shard_size=1)
        run.join_planner()
        elsewhere()
        stranger = ShardWorker(client, QUEUE)
        for text in stranger.take().values():
            stranger.tell(stranger.bury(text, f"there is no object {prefix}"))
        ended = run.wait(timeout=20)
        assert (ended.state, ended.failed, ended.refused) == ("failed", 3, 3)


class TestDoctor:
    def test_it_names_both_stores_and_adopts_one(
        self,
        redis: Redis,
        settings: Settings,
        member: Membership,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(doctor_store, "RACERS", 2)
        monkeypatch.setenv("PIPEFLEET_STORE", other(settings).store)

        def found() -> Check:
            return next(one for one in run_checks() if one.name == "fleet identity")

        assert not found().ok
        assert settings.store in found().detail
        assert "s3://pipefleet/another/" in found().detail
        cli.main(["doctor", "--adopt-store"])
        assert "is the store of this Redis's fleet from now on" in capsys.readouterr().err
        assert found().ok
        with Client(settings) as late, pytest.raises(FleetMismatchError, match="s3://pipefleet/another/"):
            late.submit(TASK, "a text")
