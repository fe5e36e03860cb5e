"""The commands of docker-compose.yml, run for real: servers that ask for their passwords and keep what they are told to keep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from pipefleet_workers.fleet.local.servers import weed_binary
from tests.deploy.processes import free_ports, running, status, wait_for
from tests.deploy.tools import DEPLOY, run

Services = dict[str, Any]


def test_redis_wants_its_password_hides_it_and_keeps_what_it_is_told(
    redis: tuple[Redis, subprocess.Popen[bytes]], services: Services
) -> None:
    client, process = redis
    port = client.connection_pool.connection_kwargs["port"]
    with pytest.raises(AuthenticationError, match="required"):
        Redis(port=port, protocol=2, retry=Retry(NoBackoff(), 0)).ping()
    settings: Any = client.config_get("append*", "save", "maxmemory-policy")
    assert settings["appendonly"] == "yes"
    assert settings["save"] == ""
    assert settings["maxmemory-policy"] == "noeviction"
    password = services["redis"]["environment"]["REDIS_PASSWORD"].encode()
    assert password not in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_flower_asks_for_a_password_changes_nothing_and_remembers(
    redis: tuple[Redis, subprocess.Popen[bytes]], services: Services, tmp_path: Path
) -> None:
    kwargs = redis[0].connection_pool.connection_kwargs
    (port,) = free_ports(1)
    settings = services["flower"]["environment"]
    state = tmp_path / "state"
    here = {
        "PIPEFLEET_REDIS_URL": f"redis://:{kwargs['password']}@127.0.0.1:{kwargs['port']}/0",
        "FLOWER_ADDRESS": "127.0.0.1", "FLOWER_PORT": str(port), "FLOWER_DB": str(state),
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", *services["flower"]["entrypoint"]]
    with running(command, cwd=tmp_path, environment=settings | here) as process:
        wait_for(lambda: status(f"{url}/healthcheck") == 200, process, log=tmp_path / "log")
        user = settings["FLOWER_BASIC_AUTH"]
        assert status(f"{url}/workers") == 401
        assert status(f"{url}/workers", user="pipefleet:wrong") == 401
        assert status(f"{url}/workers", user=user) == 200
        assert status(f"{url}/api/worker/shutdown/any", user=user, method="POST", body=b"") == 403
        assert run([sys.executable, DEPLOY / "images" / "healthy.py", f"{url}/healthcheck"]).returncode == 0
        assert run([sys.executable, DEPLOY / "images" / "healthy.py", f"{url}/workers"]).returncode == 1
    assert list(tmp_path.glob("state*"))


@pytest.fixture
def s3(services: Services, tmp_path: Path) -> Iterator[dict[str, int]]:
    parts = ["master", "volume", "filer", "s3"]
    names = [f"{part}.{kind}" for part in parts for kind in ("port", "port.grpc")] + ["admin.port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    ports["admin.port.grpc"] = ports["admin.port"] + 10_000
    command = [one.replace("-dir=/data", "-dir=.") for one in services["s3"]["command"]]
    here = [f"-{name}={port}" for name, port in ports.items()]
    sockets = ["-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"]
    environment = services["s3"]["environment"] | {"HOME": str(tmp_path)}
    flags = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", *here, *sockets]
    with running([weed_binary(), *command, *flags], cwd=tmp_path, environment=environment) as process:
        url = f"http://127.0.0.1:{ports['s3.port']}"
        wait_for(lambda: status(f"{url}/healthz") == 200, process, log=tmp_path / "log")
        admin = client(ports, services)

        def has_bucket() -> bool:
            try:
                return [one["Name"] for one in admin.list_buckets()["Buckets"]] == ["pipefleet"]
            except ClientError:
                return False

        wait_for(has_bucket, process, log=tmp_path / "log")
        yield ports
        process.kill()  # its last step waits for idle connections
    for part in (*parts, "admin"):
        Path(f"/tmp/seaweedfs-{part}-grpc-{ports[f'{part}.port.grpc']}.sock").unlink(missing_ok=True)


def client(ports: dict[str, int], services: Services, **changed: Any) -> Any:
    settings = services["s3"]["environment"]
    keys = {
        "aws_access_key_id": settings["AWS_ACCESS_KEY_ID"],
        "aws_secret_access_key": settings["AWS_SECRET_ACCESS_KEY"],
        "config": Config(retries={"total_max_attempts": 1}, proxies={}),
    }
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **(keys | changed))


def test_s3_has_its_bucket_and_takes_nothing_without_the_right_key(s3: dict[str, int], services: Services) -> None:
    for changed in ({"aws_secret_access_key": "wrong"}, {"config": Config(signature_version=UNSIGNED)}):
        with pytest.raises(ClientError) as refused:
            client(s3, services, **changed).put_object(Bucket="pipefleet", Key="x", Body=b"x")
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    with pytest.raises(ClientError) as missing:
        client(s3, services).put_object(Bucket="other", Key="x", Body=b"x")
    assert missing.value.response["Error"]["Code"] == "NoSuchBucket"
    for port in ("filer.port", "volume.port"):
        url = f"http://127.0.0.1:{s3[port]}/buckets/pipefleet/hack"
        assert status(url, method="PUT", body=b"x") not in (200, 201, 204)
    with pytest.raises(ClientError):
        client(s3, services).head_object(Bucket="pipefleet", Key="hack")
