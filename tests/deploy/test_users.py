"""deploy/redis/users.acl: with these rights everything works, and nothing besides."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from redis import Redis
from redis.exceptions import ResponseError

from pipefleet import cli
from pipefleet.client import Client
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import TASK_NAME, Priority
from pipefleet.errors import AccessDeniedError, RunError, ServiceUnavailableError
from pipefleet.fleet.announcements import announced_fleet
from pipefleet.fleet.file import load_fleet
from pipefleet.fleet.identity import Membership
from pipefleet.jobs.text_stream import TextStream
from pipefleet.patience import Patience
from pipefleet.queues import dead_letters
from pipefleet.queues.keys import (
    CANCELLED_CHANNEL,
    POOLS_KEY,
    WORKERS_KEY,
    arriving_lists,
    job_key,
    ledger_keys,
    queue_list,
    queue_lists,
    text_key,
)
from pipefleet.queues.looking import queue_depth
from pipefleet.queues.revision_notes import note_revision
from pipefleet.runs.backlog import STALLED_SECONDS, Backlog
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.fleet.doctor import store as doctor_store
from pipefleet_workers.fleet.doctor.report import run_checks
from pipefleet_workers.fleet.scaling.service import Scaler
from tests import servers
from tests.checkpoints import cached
from tests.deploy.processes import free_ports, running, status, wait_for
from tests.deploy.tools import DEPLOY

USERS = DEPLOY / "redis" / "users.acl"
QUEUE = "pipefleet.feature-extraction"
OWN_QUEUE = f"{QUEUE}@0123abcd"
LEDGER = ledger_keys(QUEUE)
ROLES = ("producer", "operator", "worker", "control")
PROGRAMS = [servers.valkey(), servers.distribution_redis()]


@dataclass(frozen=True)
class Guarded:
    """A Redis with these users, and a fleet file."""

    server: servers.Server
    fleet: Path

    def settings(self, user: str) -> Settings:
        """Those of one user."""
        url = f"redis://{user}:{user.upper()}_PASSWORD@127.0.0.1:{self.server.port}/0"
        return Settings(redis_url=url, fleet=self.fleet)

    def redis(self, user: str) -> Redis:
        """A client for one user."""
        return Redis.from_url(self.settings(user).redis_url)

    def refused(self) -> list[tuple[str, str]]:
        """Whom Redis has refused something so far, and what; each is told once."""
        admin: Any = self.redis("admin")
        found = [(one["username"], one["object"]) for one in admin.acl_log()]
        admin.acl_log_reset()
        return found


def written(folder: Path) -> list[str]:
    """The options of a server with these users."""
    lines = [line for line in USERS.read_text().splitlines() if not line.startswith("#")]
    (folder / "users.acl").write_text("\n".join(lines) + "\n")
    return ["--aclfile", str(folder / "users.acl")]


class GuardedServer(servers.Server):
    """A server that answers nobody without a name."""

    def client(self, **options: Any) -> Redis:
        return super().client(**{"username": "admin", "password": "ADMIN_PASSWORD"} | options)


@pytest.fixture(scope="module", params=PROGRAMS, ids=["valkey", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    if request.param is None:
        pytest.skip("this machine has no redis-server of its distribution")
    folder = tmp_path_factory.mktemp("guarded")
    one = GuardedServer(request.param, folder, *written(folder))
    yield one
    one.kill()


@pytest.fixture
def guarded(server: GuardedServer, tmp_path: Path) -> Guarded:
    """An empty Redis that has refused nothing yet."""
    fleet = tmp_path / "fleet.toml"
    fleet.write_text('[pools.one]\ntask = "feature-extraction"\nmodel = "/models/one"\n')
    found = Guarded(server, fleet)
    found.redis("admin").flushall()
    found.refused()
    return found


@pytest.mark.parametrize("server", [servers.valkey()], ids=["valkey"], indirect=True)
def test_producer_worker_scaler_and_flower_have_the_rights_they_need(
    guarded: Guarded, bucket: str, tmp_path: Path
) -> None:
    model = cached("feature-extraction")
    guarded.fleet.write_text(f'[pools.one]\ntask = "feature-extraction"\nmodel = "{model}"\n')
    (port,) = free_ports(1)
    common = {"PIPEFLEET_FLEET": str(guarded.fleet), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    worker = common | {
        "PIPEFLEET_REDIS_URL": guarded.settings("worker").redis_url, "PIPEFLEET_WORKER_WARM_UP": "false",
        "PIPEFLEET_WORKER_ANNOUNCE_SECONDS": "0.5", **{name: os.environ[name] for name in os.environ if name.startswith("AWS_")},
    }  # fmt: skip
    flower = common | {
        "PIPEFLEET_REDIS_URL": guarded.settings("control").redis_url, "FLOWER_ADDRESS": "127.0.0.1",
        "FLOWER_PORT": str(port), "FLOWER_READ_ONLY": "true", "FLOWER_BASIC_AUTH": "user:password",
    }  # fmt: skip
    folders = [tmp_path / name for name in ("worker", "flower")]
    for folder in folders:
        folder.mkdir()
    commands = [
        [sys.executable, "-m", "pipefleet", "worker", "--ready-file", str(tmp_path / "ready")],
        [sys.executable, "-m", "celery", "--app", "pipefleet.flower:app", "flower"],
    ]
    with ExitStack() as stack:
        started = [
            stack.enter_context(running(command, cwd=folder, environment=environment))
            for command, folder, environment in zip(commands, folders, (worker, flower), strict=True)
        ]
        wait_for((tmp_path / "ready").exists, started[0], log=folders[0] / "log")
        with Client(guarded.settings("producer")) as client:
            job = client.submit("feature-extraction", "a text", idempotency_key="once")
            assert job.result(timeout=60)
            client.submit("feature-extraction", "another").cancel()
            run = client.map("feature-extraction", ["a", "b"], output=bucket)
            assert run.wait(timeout=60).state == "succeeded"
            client.redis.lpush(QUEUE, "no message")
            wait_for(
                lambda: dead_letters.count_dead_letters(client.redis, QUEUE) == 1, started[0], log=folders[0] / "log"
            )
            assert announced_fleet(client.redis).pools.keys() == {"one"}
        reading = Scaler(load_fleet(guarded.fleet), guarded.settings("control"), cold_start=60.0).tick()
        assert reading["one"].measured.signal.ready == 1
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: status(f"{url}/healthcheck") == 200, started[1], log=folders[1] / "log")
        wait_for(lambda: bool(_seen(url)), started[1], log=folders[1] / "log")
        moved = guarded.settings("operator").model_copy(update={"store": f"{bucket}moved/"})
        Membership(guarded.redis("operator"), ObjectStore(), moved).adopt()
        assert started[0].wait(60) == 2
        assert f"belongs to a fleet whose store is {bucket}moved/" in (folders[0] / "log").read_text()
    assert guarded.refused() == []


def _seen(url: str) -> list[Any]:
    """The workers that Flower heard of."""
    authorization = {"Authorization": f"Basic {b64encode(b'user:password').decode()}"}
    request = urllib.request.Request(f"{url}/workers?json=1", headers=authorization)
    return list(json.load(urllib.request.urlopen(request, timeout=10))["data"])


LISTS = [*queue_lists(QUEUE)[:2], queue_lists(OWN_QUEUE)[3], arriving_lists(QUEUE)[0]]
READ_LIST = "LRANGE Q 0 -1; LINDEX Q 0; LPOS Q x; DUMP Q"
CHANGE_LIST = """
    LTRIM Q 1 0; LSET Q 0 x; LINSERT Q BEFORE x y; LPOP Q; RPOP Q; RPUSH Q x; RPOPLPUSH Q pipefleet.b; LMOVE Q b LEFT LEFT;
    BLMOVE Q b LEFT LEFT 0; BRPOP Q 1; BLPOP Q 1; LMPOP 1 Q LEFT; BLMPOP 1 1 Q LEFT; DEL Q; UNLINK Q; RENAME Q b;
    RENAMENX Q pipefleet.b; EXPIRE Q 0; PEXPIRE Q 0; EXPIREAT Q 1; PERSIST Q; COPY Q pipefleet.b; MOVE Q 1; SORT Q; SORT_RO Q;
    RESTORE Q 0 x; MIGRATE 127.0.0.1 1 Q 0 1; SET Q x; SETNX Q x; GETDEL Q; GETSET Q x; APPEND Q x; SETRANGE Q 0 x; SETBIT Q 0 1;
    HSET Q a b; SADD Q x; ZADD Q 1 x; SUNIONSTORE Q x; BITOP NOT Q pipefleet:run:a:parts; COPY pipefleet:run:a Q REPLACE;
    RENAME pipefleet:run:a Q; DEL pipefleet:run:a Q; SORT pipefleet:run:a STORE Q"""
SERVER = """
    KEYS *; SCAN 0; RANDOMKEY; DBSIZE; FLUSHALL; FLUSHDB; SWAPDB 0 1; CONFIG GET *; CONFIG SET maxmemory 1; ACL LIST; ACL SETUSER x;
    MONITOR; CLIENT LIST; CLIENT KILL TYPE normal; CLIENT PAUSE 1; SHUTDOWN; REPLICAOF NO ONE; FUNCTION LOAD x; FUNCTION FLUSH;
    SCRIPT FLUSH; BGSAVE; SLOWLOG GET; GET somebody-else; SET somebody-else x; CLIENT TRACKING OFF"""
FORGE = f"""
    HSET {POOLS_KEY} x y; HDEL {POOLS_KEY} x; EXPIRE {POOLS_KEY} 0; HSET {WORKERS_KEY} x y; HDEL {WORKERS_KEY} x; DEL {WORKERS_KEY};
    HSET pipefleet:parked x y; HDEL pipefleet:revisions x; HINCRBY pipefleet:work:one items 1; HSET {LEDGER["unacked_key"]} x y;
    ZADD {LEDGER["unacked_index_key"]} 1 x; ZADD {LEDGER["delayed_key"]} 1 x; HSET {LEDGER["deliveries_key"]} x 9;
    HSET {LEDGER["owners_key"]} x y; HSET {LEDGER["retries_key"]} x 9; LPUSH {LEDGER["dead_key"]} x;
    LPUSH {LEDGER["unreported_key"]} x; DEL pipefleet:fleet; XADD {text_key("x")} * at 0; DEL {text_key("x")}"""
STEER = """
    SET pipefleet:scaler:one x; PUBLISH /0.celery.pidbox shutdown; PUBLISH /0.celeryev/worker.heartbeat x;
    SADD _kombu.binding.celery.pidbox x; PSUBSCRIBE pipefleet:*; PUBSUB CHANNELS"""
SPY = f"""
    HGETALL {LEDGER["unacked_key"]}; HSCAN {LEDGER["unacked_key"]} 0; HVALS {LEDGER["unacked_key"]}; HGETALL {LEDGER["owners_key"]};
    HRANDFIELD {LEDGER["unacked_key"]}; LRANGE {LEDGER["dead_key"]} 0 -1; LINDEX {LEDGER["dead_key"]} 0;
    LRANGE {LEDGER["unreported_key"]} 0 -1; SUBSCRIBE {CANCELLED_CHANNEL}; PSUBSCRIBE pipefleet:done:*"""
REMOVE = f"LREM Q 0 x; LREM {LEDGER['dead_key']} 0 x; HDEL {LEDGER['unacked_key']} x; HDEL pipefleet:job:x error"
ADOPT = "SET pipefleet:fleet x"
MUST_NOT = {
    "producer": (READ_LIST, CHANGE_LIST, SERVER, FORGE, STEER, SPY, REMOVE, ADOPT),
    "operator": ("DUMP Q", CHANGE_LIST, SERVER, FORGE, STEER),
    "worker": (
        SERVER,
        "SORT Q; SORT Q STORE pipefleet.b; COPY Q pipefleet.b; MOVE Q 1; MIGRATE 127.0.0.1 1 Q 0 1; RESTORE Q 0 x",
    ),
    "control": (CHANGE_LIST, SERVER, FORGE, REMOVE, ADOPT, "LPUSH Q x"),
}
REFUSED = r"(?i)no permissions|can't run this command|can't access at least one|ACL failure"


def forbidden(role: str) -> list[list[str]]:
    """Every command that a role must not run; where one is about a queue, for every kind of list that a queue has."""
    words = [command.split() for text in MUST_NOT[role] for command in text.split(";")]
    commands = [
        [name if word == "Q" else word for word in one]
        for one in words
        for name in (LISTS if "Q" in one else LISTS[:1])
    ]
    assert len(commands) > 20
    return commands


def refuses(call: Callable[[], object]) -> bool:
    """Whether Redis refuses this for a want of rights."""
    try:
        call()
    except ResponseError as error:
        return re.search(REFUSED, str(error)) is not None
    return False


@pytest.mark.parametrize("role", ROLES)
def test_what_a_role_has_no_right_to_is_refused_also_in_a_script(guarded: Guarded, role: str) -> None:
    admin: Any = guarded.redis("admin")
    for name in LISTS:
        admin.lpush(name, "message")
    call, allowed = "return redis.call(unpack(ARGV))", []
    with closing(guarded.redis(role)) as redis:
        for command in forbidden(role):
            if not refuses(lambda command=command: redis.execute_command(*command)):  # type: ignore[misc]
                allowed.append(command)
            for keys in ([], [word for word in command if word in LISTS]):
                with pytest.raises(ResponseError):  # of another kind for what no script may do
                    redis.eval(call, len(keys), *keys, *command)
    assert allowed == []
    assert [admin.lrange(name, 0, -1) for name in LISTS] == [[b"message"]] * len(LISTS)


def test_a_server_before_7_refuses_the_file(tmp_path: Path) -> None:
    socket = str(tmp_path / "socket")
    command = [servers.redis_6(), "--port", "0", "--unixsocket", socket, "--dir", str(tmp_path), *written(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert "ACL" in done.stdout + done.stderr


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty prefix of a bucket, which the environment leads to; doctor has few races here."""
    monkeypatch.setattr(doctor_store, "RACERS", 2)
    with servers.moto_server() as url:
        for name, value in {
            "AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        with Client() as client:
            client.store.client.create_bucket(Bucket="pipefleet")
        yield f"s3://pipefleet/{uuid.uuid4().hex}/"  # moto keeps one world for all of its servers


def test_a_producer_can_do_all_that_is_a_producers(guarded: Guarded, bucket: str) -> None:
    with Client(guarded.settings("producer")) as client:
        once = client.submit("feature-extraction", "a text", idempotency_key="once")
        assert client.submit("feature-extraction", "a text", idempotency_key="once").id == once.id
        assert once.status() == "queued"
        with closing(guarded.redis("worker")) as worker:
            worker.xadd(text_key(once.id), {"at": 0, "text": "Once"})
        reading = TextStream(client, once, 10.0)
        assert next(reading) == "Once"
        assert once.cancel()
        run = client.map(
            "feature-extraction", [f"text {index}" for index in range(20)], output=f"{bucket}out/", shard_size=5
        )
        run.join_planner()
        assert run.progress().state == "running"
        run.cancel()
        assert run.resume() == 4
        run.join_planner()
        assert queue_depth(client.redis, QUEUE)["low"] == 8
    assert guarded.refused() == []


def test_any_celery_client_may_queue_as_a_producer(guarded: Guarded) -> None:
    app = Celery("another", broker=guarded.settings("producer").redis_url)
    app.conf.update(broker_transport_options={"priority_steps": [0, 3, 6, 9]}, task_ignore_result=True)
    app.send_task(TASK_NAME, kwargs={"a": 1}, queue=QUEUE, priority=int(Priority.LOW), retry=False)
    app.close()
    with closing(guarded.redis("admin")) as redis:
        assert queue_depth(redis, QUEUE)["low"] == 1
    assert guarded.refused() == []


def test_a_producer_sees_by_number_that_its_shards_are_lost(guarded: Guarded, bucket: str) -> None:
    settings, now = guarded.settings("producer").model_copy(update={"outstanding_shards": 4}), [0.0]
    with Client(guarded.settings("producer")) as client:
        run = client.map("feature-extraction", ["a", "b", "c", "d"], output=bucket, shard_size=1)
        run.join_planner()
    with Client(settings) as client:
        layout, patience = RunLayout.at(bucket), Patience(threading.Event())
        backlog = Backlog(client, layout, run.plan, patience, clock=lambda: now[0])
        backlog.begin()
        waiting = []
        for lost in (False, True):
            if lost:
                guarded.redis("admin").delete(queue_list(run.plan.queue, 9))
            now[0] += STALLED_SECONDS + 1
            assert backlog.tend(4) == 0
            waiting.append(queue_depth(client.redis, QUEUE)["low"])
    assert waiting == [4, 4]
    assert guarded.refused() == []


def use(guarded: Guarded, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """Let the command line be of this role."""
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", guarded.settings(role).redis_url)
    monkeypatch.setenv("PIPEFLEET_FLEET", str(guarded.fleet))


def file_letter(guarded: Guarded) -> str:
    """A dead letter of a job that a producer has sent; the job's id."""
    admin: Any = guarded.redis("admin")
    with Client(guarded.settings("producer")) as client:
        job = client.submit("feature-extraction", "a secret")
    name = queue_list(admin.hget(job_key(job.id), "queue").decode(), 3)
    dead_letters.file_dead_letter(admin, QUEUE, message=admin.lpop(name).decode(), reason="tried")
    return job.id


def test_dead_letters_are_an_operators(
    guarded: Guarded, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = file_letter(guarded)
    use(guarded, monkeypatch, "producer")
    assert cli.main(["dead-letters"]) == 2
    told = capsys.readouterr()
    assert "a secret" not in told.out + told.err
    assert "needs LRANGE on pipefleet:dead:" in told.err
    assert "'producer' may not run; use the role operator" in told.err
    use(guarded, monkeypatch, "operator")
    assert cli.main(["dead-letters", "--requeue"]) == 0
    assert f"{job}  " in capsys.readouterr().out
    assert guarded.refused() == []


def test_a_run_is_moved_by_an_operator(guarded: Guarded, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(guarded.settings("producer")) as client:
        run = client.map("feature-extraction", ["a", "b"], output=f"{bucket}out/", shard_size=1)
        run.join_planner()
        guarded.fleet.write_text(guarded.fleet.read_text().replace("/models/one", "/models/two"))
    with Client(guarded.settings("producer")) as client:
        with pytest.raises(
            AccessDeniedError, match=r"moving a run to another model needs LRANGE on .* use the role operator"
        ):
            client.run(run.uri).resume(model="/models/two")
    with Client(guarded.settings("operator")) as client:
        moved = client.run(run.uri)
        assert moved.resume(model="/models/two") == 2
        moved.join_planner()
        assert queue_depth(client.redis, QUEUE)["low"] == 2
    with Client(guarded.settings("producer")) as client:
        again = client.run(run.uri)
        assert again.resume() == 2
        again.join_planner()
    assert guarded.refused() == []


@pytest.mark.parametrize("role", ROLES)
def test_doctor_queues_and_top_work_for_every_role(
    guarded: Guarded, bucket: str, role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file_letter(guarded)
    with Client(guarded.settings("producer")) as client:
        client.submit("feature-extraction", "a text")
        note_revision(client.redis, OWN_QUEUE, "/models/old", None)
        client.redis.lpush(OWN_QUEUE, "{}")
    use(guarded, monkeypatch, role)
    checks = {one.name: one for one in run_checks()}
    assert checks["redis"].ok, checks["redis"]
    assert "version" in checks["redis"].detail
    assert f"user {role}" in checks["redis rights"].detail
    assert ("read messages" in checks["redis rights"].detail.partition("may not")[0]) == (role != "producer")
    assert checks["pool one"].detail.startswith("no worker is alive, 1 message waits")
    assert cli.main(["queues"]) == 0
    assert cli.main(["top", "--once"]) == 0
    assert guarded.refused() == []


def test_a_right_that_is_missing_is_named(guarded: Guarded) -> None:
    redis, url = guarded.redis("producer"), guarded.settings("producer").redis_url
    script = "return redis.call('RPOP', KEYS[1])"
    lacks = r"refuses access .*: its user lacks (the right to run rpop|a right that this needs); see the roles in"
    for call in (lambda: redis.rpop(QUEUE), lambda: redis.eval(script, 1, QUEUE)):
        with pytest.raises(ServiceUnavailableError, match=lacks), redis_errors(url):
            call()


def test_a_producer_may_see_that_messages_of_its_run_are_lost(
    guarded: Guarded, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipefleet.queues.lost_messages.GRACE_SECONDS", 0.5)
    with Client(guarded.settings("producer")) as client:
        run = client.map("feature-extraction", ["a", "b"], output=bucket)
        run.join_planner()
        assert run.progress().state == "running"
        guarded.redis("admin").delete(*queue_lists(run.plan.queue))
        with pytest.raises(RunError, match="1 shard is neither done nor queued nor with a worker"):
            run.wait(timeout=30)
    assert guarded.refused() == []
