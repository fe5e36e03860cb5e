"""deploy/redis/users.acl: with these rights everything works, and nothing besides."""

from __future__ import annotations

import json
import sys
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from pipefleet import broker
from pipefleet.announcements import announced_fleet
from pipefleet.client import Client
from pipefleet.fleet import load_fleet
from pipefleet.settings import Settings
from pipefleet_workers.local.servers import redis_binary
from pipefleet_workers.scaling.service import Scaler
from tests.checkpoints import cached
from tests.deploy.processes import free_ports, running, status, wait_for
from tests.deploy.tools import DEPLOY

USERS = DEPLOY / "redis" / "users.acl"
QUEUE = "pipefleet.feature-extraction"


@dataclass(frozen=True)
class Guarded:
    """A Redis with these users, and a fleet file."""

    port: int
    fleet: Path

    def settings(self, user: str) -> Settings:
        """Those of one user."""
        url = f"redis://{user}:{user.upper()}_PASSWORD@127.0.0.1:{self.port}/0"
        return Settings(redis_url=url, fleet=self.fleet)

    def redis(self, user: str) -> Redis:
        """A client for one user."""
        return Redis.from_url(self.settings(user).redis_url)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    (port,) = free_ports(1)
    lines = [line for line in USERS.read_text().splitlines() if not line.startswith("#")]
    (tmp_path / "users.acl").write_text("\n".join(lines) + "\n")
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'[pools.one]\ntask = "feature-extraction"\nmodel = "{cached("feature-extraction")}"\n')
    command: list[str | Path] = [
        redis_binary(),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--aclfile",
        tmp_path / "users.acl",
        "--save",
        "",
    ]
    found = Guarded(port, fleet)
    with running(command, cwd=tmp_path, environment={}) as process:

        def answers() -> bool:
            try:
                return bool(found.redis("admin").ping())
            except RedisError:
                return False

        wait_for(answers, process, log=tmp_path / "log")
        yield found


def test_producer_worker_scaler_and_flower_have_the_rights_they_need(guarded: Guarded, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    common = {"PIPEFLEET_FLEET": str(guarded.fleet), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    worker = common | {
        "PIPEFLEET_REDIS_URL": guarded.settings("worker").redis_url, "PIPEFLEET_WORKER_WARM_UP": "false",
        "AWS_ACCESS_KEY_ID": "unused", "AWS_SECRET_ACCESS_KEY": "unused",
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
            redis = broker.connect(guarded.settings("producer"))
            assert announced_fleet(redis).pools.keys() == {"one"}
            assert list(broker.queued_ids(redis, QUEUE)) is not None
        reading = Scaler(load_fleet(guarded.fleet), guarded.settings("control"), cold_start=60.0).tick()
        assert reading["one"].measured.signal.ready == 1
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: status(f"{url}/healthcheck") == 200, started[1], log=folders[1] / "log")
        wait_for(lambda: bool(_seen(url)), started[1], log=folders[1] / "log")
    log: Any = guarded.redis("admin").acl_log()
    assert [(one["username"], one["reason"], one["object"]) for one in log] == []


def _seen(url: str) -> list[Any]:
    """The workers that Flower heard of."""
    authorization = {"Authorization": f"Basic {b64encode(b'user:password').decode()}"}
    request = urllib.request.Request(f"{url}/workers?json=1", headers=authorization)
    return list(json.load(urllib.request.urlopen(request, timeout=10))["data"])


@pytest.mark.parametrize(
    ("user", "command"),
    [
        ("producer", lambda redis: redis.rpop(QUEUE)),
        ("producer", lambda redis: redis.brpop([QUEUE], 1)),
        ("producer", lambda redis: redis.eval("return redis.call('RPOP', KEYS[1])", 1, QUEUE)),
        ("producer", lambda redis: redis.get("somebody-else")),
        ("producer", lambda redis: redis.publish("/0.celery.pidbox", "shutdown")),
        ("producer", lambda redis: redis.flushall()),
        ("producer", lambda redis: redis.keys()),
        ("producer", lambda redis: redis.config_get("*")),
        ("worker", lambda redis: redis.flushdb()),
        ("worker", lambda redis: redis.acl_list()),
        ("worker", lambda redis: redis.config_set("requirepass", "")),
        ("control", lambda redis: redis.rpop(QUEUE)),
        ("control", lambda redis: redis.hset("pipefleet:pools", "x", "y")),
        ("control", lambda redis: redis.flushall()),
    ],
)
def test_what_a_user_has_no_right_to_is_refused(guarded: Guarded, user: str, command: Callable[[Any], object]) -> None:
    with pytest.raises(ResponseError, match=r"(?i)no permissions"):
        command(guarded.redis(user))
