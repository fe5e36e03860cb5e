"""Several revisions of a model on one pool: their queues, who is told of them, what waits for each, and moving a run."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet import cli
from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority
from pipefleet.contract.shards import shard_id
from pipefleet.errors import FleetFileError, PipefleetError, UnknownModelError, UsageError
from pipefleet.fleet.announcements import (
    announce_pool,
    announce_worker,
    announced_fleet,
    announced_workers,
    announcements,
    forget_dead_workers,
    withdraw_pool,
)
from pipefleet.fleet.file import load_fleet, with_revision
from pipefleet.fleet.latest import LOOK_SECONDS, LatestFleet
from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.revisions import Held, forget_revisions, held_by_queue, parts_of, read_backlogs, waiting
from pipefleet.fleet.routing import announcement, queue_name, revision_queue, route, work_queue
from pipefleet.queues.celery import celery_app, push_job
from pipefleet.queues.keys import POOLS_KEY, REVISIONS_KEY, WORKERS_KEY, base_queue, ledger_keys, queue_lists
from pipefleet.queues.looking import queue_depth
from pipefleet.queues.revision_notes import known_revisions, queues_of
from pipefleet_workers.consume.elsewhere import Elsewhere
from pipefleet_workers.consume.jobs import Jobs
from pipefleet_workers.fleet.doctor.entries import check_entries
from pipefleet_workers.fleet.scaling.service import Scaler
from pipefleet_workers.observe.totals import record_done
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.worker import Worker

TEXTS = "text-classification"
QUEUE = f"pipefleet.{TEXTS}"
OLD, NEW = Pool("texts", TEXTS, "/models/old"), Pool("texts", TEXTS, "/models/new")
FLEET = """
[pools.texts]
task = "text-classification"
model = "/models/new"
previous = { model = "/models/old" }
workers = { max = 4 }
"""


def own(pool: Pool) -> str:
    return revision_queue(QUEUE, pool.model, pool.revision)


def told(pool: Pool) -> dict[str, Any]:
    return announcement(pool, Fleet({pool.name: pool}))


def put(redis: Redis, pool: Pool, count: int, queue: str | None = None) -> None:
    pipe = redis.pipeline()
    for index in range(count):
        job = JobMessage(f"{pool.model}-{index}", TEXTS, model=pool.model, items=(JobItem("0", "text"),))
        push_job(pipe, job, queue or own(pool), Priority.LOW)
    pipe.execute()


@pytest.fixture
def fleet(tmp_path: Path, client: Client) -> Fleet:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return load_fleet(path)


class TestNames:
    def test_each_model_and_revision_has_a_queue_of_its_own_and_all_share_a_ledger(self) -> None:
        names = {revision_queue(QUEUE, model, revision) for model in ("a", "b") for revision in (None, "1", "2")}
        assert len(names) == 6
        assert {base_queue(name) for name in names} == {QUEUE}
        assert all(ledger_keys(name) == ledger_keys(QUEUE) for name in names)
        assert ledger_keys(QUEUE + ".other") != ledger_keys(QUEUE)

    def test_a_worker_that_knows_no_such_queues_gets_its_work_where_it_looks(self) -> None:
        before = Pool.announced("texts", {**OLD.to_json(), "queue": QUEUE})
        assert work_queue(before, Fleet({"texts": before})) == QUEUE

    def test_a_plain_celery_client_reaches_one_queue_only(self, client: Client) -> None:
        consumes = celery_app(client.settings, queue=QUEUE, revision_queue=own(NEW))
        with consumes.connection_for_read() as connection:
            for queue in consumes.conf.task_queues:
                consumes.amqp.queues.add(queue)
                queue.bind(connection.default_channel).declare()
        celery_app(client.settings).send_task("pipefleet.infer", args=[{}], queue=QUEUE, ignore_result=True)
        assert [sum(queue_depth(client.redis, QUEUE).values()), waiting(client.redis, own(NEW))] == [1, 0]


class TestLatestFleet:
    def test_a_retired_revision_is_found_by_name_and_never_by_default(self, fleet: Fleet) -> None:
        assert route(TEXTS, None, None, fleet).model == NEW.model
        found = route(TEXTS, OLD.model, None, fleet)
        assert (found.model, found.key, found.workers.min) == (OLD.model, "texts@previous", 0)
        assert queue_name(found, fleet) == QUEUE
        assert work_queue(found, fleet) == own(OLD)
        assert fleet.pool("texts@previous") is found

    @pytest.mark.parametrize(("previous", "why"), [
        ('{ revision = "1" }', "previous must be a table with model"),
        ('{ model = "org/name" }', "pools.texts@previous: model 'org/name' has no revision"),
        ('{ model = "/models/new" }', "names /models/new, which the pool serves already"),
        ('{ model = "/a", device = "cpu" }', "unknown key 'device'"),
        ('"org/name"', "previous must be a table"),
        ('[{ model = "/a" }, { model = "/b" }, { model = "/c" }, { model = "/d" }]', "at most 3"),
    ])  # fmt: skip
    def test_what_is_wrong_is_named(self, tmp_path: Path, previous: str, why: str) -> None:
        path = tmp_path / "fleet.toml"
        path.write_text(FLEET.replace('{ model = "/models/old" }', previous))
        with pytest.raises(FleetFileError, match=why):
            load_fleet(path)

    def test_a_client_that_lives_long_follows_the_file(self, tmp_path: Path) -> None:
        path, now = tmp_path / "fleet.toml", [0.0]
        path.write_text(FLEET)
        file = LatestFleet(path, clock=lambda: now[0])
        first = file.fleet()
        path.write_text(FLEET.replace("/models/new", "/models/newer"))
        assert file.fleet() is first  # looked at a moment ago
        assert file.fleet(at_once=True).pool("texts").model == "/models/newer"
        path.write_text("[pools")
        now[0] += LOOK_SECONDS
        assert file.fleet().pool("texts").model == "/models/newer"  # half written
        path.unlink()
        assert file.fleet(at_once=True).pool("texts").model == "/models/newer"
        path.write_text(FLEET)
        now[0] += LOOK_SECONDS
        assert file.fleet().pool("texts").model == "/models/new"

    def test_until_it_can_be_read_a_fleet_that_is_known_counts(self, tmp_path: Path, fleet: Fleet) -> None:
        path = tmp_path / "edited.toml"
        file = LatestFleet(path, known=fleet)
        assert file.fleet() is fleet
        path.write_text("[pools")
        assert file.fleet(at_once=True) is fleet
        path.write_text(FLEET.replace("/models/new", "/models/newer"))
        assert file.fleet(at_once=True).pool("texts").model == "/models/newer"

    def test_a_worker_may_be_started_for_any_revision_but_gets_no_new_work(self, fleet: Fleet) -> None:
        pool = fleet.pool("texts")
        assert with_revision(pool, "/models/old", None) is pool.previous[0]
        other = with_revision(pool, "/models/older", None)
        assert (other.generation, told(other)["retired"]) == (2, True)
        with pytest.raises(FleetFileError, match="no revision"):
            with_revision(pool, "org/name", None)


class TestAnnouncements:
    def test_of_two_revisions_the_later_one_gets_new_work(self, redis: Redis) -> None:
        announce_pool(redis, "texts", told(OLD), seconds=60)
        announce_pool(redis, "texts", told(NEW), seconds=60)
        announce_pool(redis, "texts", told(OLD), seconds=60)  # it goes on being announced, and is not new by that
        fleet = announced_fleet(redis)
        assert route(TEXTS, None, None, fleet).model == NEW.model
        assert work_queue(route(TEXTS, OLD.model, None, fleet), fleet) == own(OLD)

    def test_a_revision_that_comes_back_is_the_later_one(self, redis: Redis) -> None:
        for pool, seconds in ((OLD, -1), (NEW, 60), (OLD, 60)):
            announce_pool(redis, "texts", told(pool), seconds=seconds)
        assert route(TEXTS, None, None, announced_fleet(redis)).model == OLD.model

    def test_a_revision_whose_last_worker_has_ended_is_new_when_it_comes_back(self, redis: Redis) -> None:
        announce_worker(redis, "texts@one", {"pool": "texts", "queue": own(OLD)}, seconds=60)
        for pool in (OLD, NEW):
            announce_pool(redis, "texts", told(pool), seconds=60)
        withdraw_pool(redis, "texts", told(OLD))  # another worker of it is alive
        assert [one.pool.model for one in announcements(redis)] == [NEW.model, OLD.model]
        redis.hdel(WORKERS_KEY, "texts@one")
        withdraw_pool(redis, "texts", told(OLD))
        announce_pool(redis, "texts", told(OLD), seconds=60)
        assert route(TEXTS, None, None, announced_fleet(redis)).model == OLD.model

    def test_a_worker_is_retired_once_the_fleet_file_says_so_and_another_takes_new_work(
        self, client: Client, redis: Redis, fleet: Fleet, tmp_path: Path
    ) -> None:
        file = LatestFleet(tmp_path / "fleet.toml", clock=itertools.count(step=LOOK_SECONDS).__next__)
        worker = Worker(fleet, fleet.pool("texts"), client.settings, WorkerSettings(), file)
        assert worker._announced(redis)["retired"] is False
        back = FLEET.replace("/models/new", "/models/x").replace("/models/old", "/models/new")
        (tmp_path / "fleet.toml").write_text(back.replace("/models/x", "/models/old"))
        announce_pool(redis, "texts", told(OLD) | {"retired": True}, seconds=60)
        announce_pool(redis, "texts", worker._announced(redis), seconds=60)
        assert route(TEXTS, None, None, announced_fleet(redis)).model == NEW.model  # nobody else does it
        announce_pool(redis, "texts", told(OLD), seconds=60)
        assert worker._announced(redis)["retired"] is True
        (tmp_path / "fleet.toml").write_text(FLEET)
        assert worker._announced(redis)["retired"] is False

    def test_a_retired_revision_gets_no_new_work_however_late_it_comes(self, redis: Redis, fleet: Fleet) -> None:
        retired = announcement(fleet.pool("texts@previous"), fleet)
        announce_pool(redis, "texts", retired, seconds=60)
        alone = announced_fleet(redis)
        assert route(TEXTS, OLD.model, None, alone).model == OLD.model
        with pytest.raises(UnknownModelError):
            route(TEXTS, None, None, alone)
        announce_pool(redis, "texts", told(NEW), seconds=60)
        announce_pool(redis, "texts", retired, seconds=60)
        assert route(TEXTS, None, None, announced_fleet(redis)).model == NEW.model

    @pytest.mark.parametrize("error", [-3600.0, 3600.0])
    def test_no_clock_but_the_servers_counts(self, redis: Redis, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + error)
        announce_pool(redis, "texts", told(OLD), seconds=30)
        announce_worker(redis, "texts@one", {"pool": "texts"}, seconds=30)
        monkeypatch.setattr(time, "time", real)
        announce_pool(redis, "texts", told(NEW), seconds=30)
        assert [one.pool.model for one in announcements(redis)] == [NEW.model, OLD.model]
        assert announced_workers(redis)["texts@one"]["age"] < 30
        announce_worker(redis, "texts@one", {"pool": "texts"}, seconds=-1)
        assert announced_workers(redis) == {}
        forget_dead_workers(redis)
        assert not redis.exists(WORKERS_KEY)

    def test_entries_of_older_workers_are_read_and_others_are_passed_over(self, redis: Redis) -> None:
        older = {"pool": {**OLD.to_json(), "default": True, "queue": QUEUE}, "until": time.time() + 60}
        redis.hset(POOLS_KEY, "texts", json.dumps(older))
        for number, value in enumerate(
            ["", "[]", '{"pool": {}, "until": 4e9}', '{"pool": null, "until": "x"}', b"\xff"]
        ):
            redis.hset(POOLS_KEY, f"garbage-{number}", value)
            redis.hset(WORKERS_KEY, f"garbage-{number}", value)
        fleet = announced_fleet(redis)
        assert list(fleet.pools) == ["texts"]
        assert work_queue(fleet.pools["texts"], fleet) == QUEUE
        assert announced_workers(redis) == {}
        announce_pool(redis, "texts", told(NEW), seconds=60)
        assert route(TEXTS, None, None, announced_fleet(redis)).model == NEW.model


class TestElsewhere:
    def message(self, pool: Pool, **changes: Any) -> JobMessage:
        fields = {"task": TEXTS, "model": pool.model, "items": (JobItem("0", "text"),), **changes}
        return JobMessage("one", **fields)

    def jobs(self, client: Client, file: LatestFleet | None) -> Jobs:
        engine: Any = None
        return Jobs(NEW, engine, elsewhere=Elsewhere(client.settings, file))

    def test_a_job_goes_to_the_revision_that_a_live_worker_or_the_fleet_file_serves(
        self, client: Client, redis: Redis, tmp_path: Path, fleet: Fleet
    ) -> None:
        alone = self.jobs(client, None)
        assert alone.elsewhere(self.message(OLD)) is None
        assert self.jobs(client, LatestFleet(tmp_path / "fleet.toml")).elsewhere(self.message(OLD)) == own(OLD)
        announce_pool(redis, "texts", told(OLD), seconds=60)
        assert alone.elsewhere(self.message(OLD)) == own(OLD)
        assert own(OLD) in queues_of(redis, QUEUE)

    def test_its_own_and_what_nobody_else_could_run_stays(self, client: Client) -> None:
        jobs = self.jobs(client, None)
        for message in (self.message(NEW), self.message(NEW, model=None), self.message(NEW, task="translation")):
            assert jobs.elsewhere(message) is None
        assert jobs.refusal(self.message(NEW)) is None
        failure = jobs.refusal(self.message(OLD))
        assert failure is not None
        assert failure.code == "wrong_pool"
        assert all(word in failure.message for word in ("/models/old", "/models/new", "start a worker"))


class TestBacklogs:
    def test_queues_show_who_waits_for_a_revision_that_nobody_serves(
        self, client: Client, redis: Redis, fleet: Fleet
    ) -> None:
        older = Pool("texts", TEXTS, "/models/older")
        put(redis, NEW, 1)
        put(redis, OLD, 2)
        put(redis, older, 3)
        put(redis, NEW, 4, queue=QUEUE)
        announce_worker(redis, "texts@one", {"pool": "texts", "queue": own(NEW)}, seconds=60)
        first, second, third = read_backlogs(redis, fleet)
        assert [one.waiting["low"] for one in (first, second, third)] == [5, 2, 3]
        assert [one.workers for one in (first, second, third)] == [1, 0, 0]
        assert first.note is None
        assert "`pipefleet worker --pool texts --previous`" in (second.note or "")
        assert "`pipefleet worker --pool texts --model /models/older`" in (third.note or "")
        assert "`pipefleet resume RUN_URI --model /models/new`" in (third.note or "")
        assert waiting(redis, own(OLD)) == 2

    def test_without_a_fleet_file_and_without_workers_it_is_still_seen(self, redis: Redis) -> None:
        put(redis, OLD, 2)
        (one,) = read_backlogs(redis, Fleet({}))
        assert one.waiting["low"] == 2
        assert f"pipefleet worker --task {TEXTS} --model /models/old" in (one.note or "")

    def test_what_workers_hold_is_told_apart_by_its_queue(self, client: Client, redis: Redis, fleet: Fleet) -> None:
        keys = ledger_keys(QUEUE)
        for number, queue in enumerate([QUEUE, own(NEW), own(OLD), own(OLD), own(OLD)]):
            redis.hset(keys["unacked_key"], str(number), f'[{{"a": "]"}}, "", "{queue}"]')
        redis.zadd(keys["delayed_key"], {"4": 1.0})
        assert held_by_queue(redis, own(OLD)) == {QUEUE: Held(1), own(NEW): Held(1), own(OLD): Held(2, 1)}
        new, old = parts_of(redis, fleet)
        assert (new.held, old.held) == (Held(2), Held(2, 1))

    def test_the_scaler_counts_both(self, client: Client, redis: Redis, fleet: Fleet) -> None:
        put(redis, NEW, 1)
        put(redis, OLD, 2)
        put(redis, NEW, 4, queue=QUEUE)
        announce_worker(redis, "texts@one", {"pool": "texts", "queue": own(OLD)}, seconds=60)
        scaler = Scaler(fleet, client.settings, cold_start=60.0)
        found = scaler.tick()
        assert list(found) == ["texts", "texts@previous"]
        assert [one.reading.count("queued") for one in found.values()] == [5, 2]
        assert [one.measured.signal.ready for one in found.values()] == [0, 1]
        assert [one.decision.desired for one in found.values()] == [1, 1]
        record_done(redis, "texts", own(NEW).replace(QUEUE, "texts"), cost=7.0, seconds=1.0)
        assert [one.reading.done.cost for one in scaler.tick().values()] == [7.0, 0.0]


class TestMoving:
    @pytest.fixture
    def both(self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "fleet.toml"
        path.write_text(FLEET.replace("/models/new", "/models/old").replace('previous = { model = "/models/old" }', ""))
        monkeypatch.setenv("PIPEFLEET_FLEET", str(path))
        return path

    def test_a_run_is_moved_and_its_waiting_shards_with_it(
        self, both: Path, prefix: str, queued: Callable[[str], list[str]]
    ) -> None:
        with Client() as client:
            client.redis.flushall()
            run = client.map(TEXTS, [str(number) for number in range(40)], output=prefix, shard_size=10)
            run.join_planner()
            assert waiting(client.redis, own(OLD)) == 4
            other = client.submit(TEXTS, "stays")
            both.write_text(FLEET)
            os.utime(both, (1.0, 1.0))
        with Client() as client:
            again = client.run(prefix)
            assert again.resume() == 0
            assert "start one with `pipefleet worker --pool texts --model /models/old`" in (again.unserved() or "")
            with pytest.raises(UnknownModelError):
                again.resume(model="/models/nobody")
            assert again.resume(model="/models/new") == 4
            again.join_planner()
            assert (waiting(client.redis, own(OLD)), waiting(client.redis, own(NEW))) == (1, 4)
            assert set(queued(QUEUE)) == {other.id, *(shard_id(again.id, index) for index in range(4))}
            assert again.resume() == 0
            opened = client.run(prefix).plan
            assert (opened.model, opened.queue, opened.shards) == ("/models/new", own(NEW), 4)
            assert json.loads(client.store.get(f"{prefix}_run/run.json"))["model"] == "/models/old"

    def test_shards_of_a_run_in_the_pools_own_queue_count_as_queued(self, both: Path, prefix: str) -> None:
        with Client() as client:
            client.redis.flushall()
            run = client.map(TEXTS, [str(number) for number in range(40)], output=prefix, shard_size=10)
            run.join_planner()
            for name, base in zip(queue_lists(own(OLD)), queue_lists(QUEUE), strict=True):
                if client.redis.exists(name):
                    client.redis.rename(name, base)  # as a producer of the release before queues them
            assert client.run(prefix).resume() == 0

    def test_a_planner_at_work_elsewhere_follows(self, both: Path, prefix: str) -> None:
        with Client() as client:
            client.redis.flushall()
            go_on: list[str] = []

            def source() -> Any:
                for number in range(40):
                    if number == 20:
                        both.write_text(FLEET)
                        with Client() as other:
                            other.run(prefix)._move(other.route(TEXTS, "/models/new", None)[1])
                        go_on.append("moved")
                    yield str(number)

            run = client.map(TEXTS, source(), output=prefix, shard_size=10)
            run.join_planner()
            assert go_on == ["moved"]
            assert waiting(client.redis, own(NEW)) >= 2
            assert waiting(client.redis, own(OLD)) == 0


def test_a_worker_that_is_asked_for_the_previous_revision_serves_it(fleet: Fleet, tmp_path: Path) -> None:
    from pipefleet_workers.cli import _chosen_pool

    def chosen(*arguments: str) -> Pool:
        return _chosen_pool(cli.build_parser().parse_args(["worker", *arguments]), tmp_path / "fleet.toml")[1]

    assert chosen("--pool", "texts").model == "/models/new"
    assert chosen("--pool", "texts", "--previous").model == "/models/old"
    assert chosen("--pool", "texts@previous").model == "/models/old"
    assert chosen("--model", "/models/old").key == "texts@previous"
    assert chosen("--model", "/models/older").generation == 2
    with pytest.raises(UsageError, match="leave --model"):
        chosen("--previous", "--model", "/models/old")


def test_queues_that_nobody_used_for_long_are_forgotten_once_they_are_empty(redis: Redis) -> None:
    put(redis, OLD, 1)
    put(redis, NEW, 1)
    forget_revisions(redis, days=-1.0)
    assert len(known_revisions(redis)) == 2
    redis.delete(*queue_lists(own(OLD)))
    forget_revisions(redis)
    assert len(known_revisions(redis)) == 2
    forget_revisions(redis, days=-1.0)
    assert list(known_revisions(redis)) == [own(NEW)]


FOREIGN = ("elsewhere", "elsewhere@0123abcd", "pipefleet:workers", "pipefleet:workers@0123abcd", "")


def test_worker_that_starts_asks_nothing_of_keys_that_are_no_queues(redis: Redis) -> None:
    note = {"model": "/m", "revision": None, "at": 0}
    for one, value in itertools.product((*FOREIGN, "pipefleet.other@0123abcd"), (b"x", json.dumps(note).encode())):
        redis.hset("pipefleet:workers", "one", "{}")
        redis.hset("pipefleet.other@0123abcd", "another", "type")
        redis.hset(REVISIONS_KEY, one, value)
        forget_revisions(redis)
        assert bool(redis.hlen(REVISIONS_KEY)) == (one not in FOREIGN)


@pytest.mark.parametrize("name", FOREIGN[:4])
def test_no_entry_of_anybody_makes_a_queue_of_another_key(
    name: str, client: Client, redis: Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    redis.hset("pipefleet:workers", "one", "{}")
    redis.hset(REVISIONS_KEY, name, json.dumps({"model": "/m", "revision": None, "at": 9e9}))
    entry = {"task": TEXTS, "model": "/m", "queue": QUEUE, "revision_queue": own(OLD)}
    for field in ("queue", "revision_queue"):
        redis.hset(POOLS_KEY, f"bad-{field}", json.dumps({"pool": {**entry, field: name}, "until": 9e9}))
    assert known_revisions(redis) == {}
    assert announced_fleet(redis).pools == {}
    with pytest.raises(PipefleetError, match=f"{POOLS_KEY} .*bad-queue.*{REVISIONS_KEY} .*{name}"):
        check_entries(client.settings)
    assert cli.main(["queues", "--json"]) == 0
    assert {one["queue"] for one in json.loads(capsys.readouterr().out)} == {
        queue_name(pool, client.fleet) for pool in client.fleet.pools.values()
    }
