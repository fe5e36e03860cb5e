from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from pipefleet_workers.fleet.local.servers import redis_binary
from tests.deploy.processes import free_ports, running, wait_for
from tests.deploy.project import copied, project

Services = dict[str, Any]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied(tmp_path)


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    """What Compose starts, by name."""
    return dict(project(copied(tmp_path_factory.mktemp("compose")))["services"])


@pytest.fixture
def redis(services: Services, tmp_path: Path) -> Iterator[tuple[Redis, subprocess.Popen[bytes]]]:
    """Redis as Compose starts it, and its process."""
    (port,) = free_ports(1)
    folder = tmp_path / "redis"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "valkey-server").symlink_to(redis_binary())
    shell, flag, script = services["redis"]["command"]
    here = script.replace("valkey-server -", f"bin/valkey-server - --port {port} --bind 127.0.0.1 --dir {folder}")
    with running([shell, flag, here], cwd=folder, environment=services["redis"]["environment"]) as process:
        client = Redis(port=port, password=services["redis"]["environment"]["REDIS_PASSWORD"])

        def answers() -> bool:
            try:
                return bool(client.ping())
            except RedisError:
                return False

        wait_for(answers, process, log=folder / "log")
        yield client, process
