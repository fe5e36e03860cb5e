"""All of pipefleet on one machine: a Redis-compatible server, an S3 server, workers, Flower, and a scaler if wanted."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from .children import Children
from .credentials import Credentials
from .errors import PortTakenError, StackError
from .files import env_lines, private_folder, write_private
from .flower import Flower
from .lock import DataLock
from .ports import LOOPBACK, PortBook
from .servers import BUCKET, REGION, RedisServer, S3Server
from .service import Service, Site, wait_ready
from .workers import Crew, WorkerCommand, worker_command

if TYPE_CHECKING:
    from .autoscale import Autoscaler, Pace

_Part = TypeVar("_Part", RedisServer, S3Server)

FLOWER_APP = "pipefleet.flower:app"
SERVER_SECONDS = 30.0
WORKER_SECONDS = 300.0
WORKER_GRACE = 20.0
_PORT_ATTEMPTS = 3
_WATCH_SECONDS = 0.1
# What the caller's shell says about other brokers, stores and dashboards must not reach the children.
_FOREIGN_PREFIXES = ("AWS_", "CELERY_", "FLOWER_")


class Stack:
    """Everything under one data directory, on loopback, with generated credentials; a context manager.

    `pools` has one pool name per worker process (repeat it for several workers of a pool); none by default.
    `fleet` is the fleet file that the workers read. `redis_binary` overrides the choice of `RedisServer`.
    `worker_command` is for tests.

        with Stack(Path(".pipefleet"), fleet=Path("fleet.toml"), pools=["speech"]) as stack:
            stack.supervise()

    One thread at a time may call it, except `request_stop`, which any thread or signal handler may. On Linux
    nothing that it started survives this process, however it ends.
    """

    def __init__(
        self,
        data: Path,
        *,
        fleet: Path | None = None,
        pools: Sequence[str] = (),
        flower: bool = True,
        redis_binary: str | None = None,
        worker_command: WorkerCommand = worker_command,
    ) -> None:
        self.data = data.absolute()
        self._fleet = fleet.absolute() if fleet is not None else None
        self._pools = tuple(pools)
        self._with_flower = flower
        self._redis_binary = redis_binary
        self._worker_command = worker_command
        self._children = Children()
        self._lock = DataLock(self.data / "lock")
        self._stop_requested = False
        self._redis: RedisServer | None = None
        self._s3: S3Server | None = None
        self._flower: Flower | None = None
        self._crew: Crew | None = None
        self._pace: Pace | None = None
        self._autoscaler: Autoscaler | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def redis(self) -> RedisServer:
        """The Redis-compatible server. Raises StackError unless the stack is started."""
        return _started(self._redis)

    @property
    def s3(self) -> S3Server:
        """The S3 server. Raises StackError unless the stack is started."""
        return _started(self._s3)

    @property
    def flower(self) -> Flower | None:
        """Flower, or None without one."""
        return self._flower

    @property
    def scaler_url(self) -> str | None:
        """Where the scaler answers, or None without one."""
        return None if self._autoscaler is None else self._autoscaler.url

    def autoscale(self, pace: Pace) -> Self:
        """From `start` on, let `supervise` start and drain workers with the work, by the fleet file's limits. Returns itself.

        `pools` are the workers of the beginning. Raises StackError without a fleet file.
        """
        if self._fleet is None:
            raise StackError("autoscaling needs a fleet file: it says how many workers a pool may have")
        self._pace = pace
        return self

    def start(self) -> None:
        """Start everything and return once it answers; on any error or interrupt, stop what was started.

        Raises StackError when the data directory is in use, a program is missing, or a part ends or is not
        ready in time (servers and Flower 30 s, workers 300 s); UsageError when the scaler's port is in use.
        """
        site = self._open_site()
        try:
            self._start_servers(site)
            self._start_clients(site)
        except BaseException:
            self.stop()
            raise

    def environment(self) -> dict[str, str]:
        """Return what a client or worker needs in its environment. Raises StackError unless started."""
        credentials = self.s3.credentials
        fleet = {} if self._fleet is None else {"PIPEFLEET_FLEET": str(self._fleet)}
        scaler = {} if self.scaler_url is None else {"PIPEFLEET_SCALER_URL": self.scaler_url}
        return {
            "PIPEFLEET_REDIS_URL": self.redis.url,
            "PIPEFLEET_STORE": f"s3://{BUCKET}/store/",
            **fleet,
            "AWS_ENDPOINT_URL_S3": self.s3.endpoint,
            "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
            "AWS_REGION": REGION,
            **scaler,
        }

    def write_env_file(self, path: Path) -> None:
        """Write `environment()` to `path` as `KEY=VALUE` lines, mode 0600, by a rename.

        Raises StackError unless started or when the file cannot be written.
        """
        try:
            write_private(path, env_lines(self.environment()))
        except (OSError, ValueError) as error:
            raise StackError(f"cannot write {path}: {error}; choose another --env-file") from error

    def request_stop(self) -> None:
        """Make `supervise` return within 0.1 s; safe in a signal handler."""
        self._stop_requested = True

    def supervise(self) -> None:
        """Block until `request_stop` is called; start an ended worker again, up to 3 times, with a note; autoscale, if told to.

        Raises StackError, with the end of its log, when another part ended or a worker for the fourth time.
        """
        while not self._stop_requested:
            self._revive()
            if self._autoscaler is not None:
                self._autoscaler.step()
            time.sleep(_WATCH_SECONDS)

    def stop(self) -> None:
        """End the workers (20 s for the jobs in work), then all else, and give up the lock.

        A second call does nothing. After an interrupt in the middle it can be called again.
        """
        self._stop_requested = True
        if self._autoscaler is not None:
            self._autoscaler.stop()
            self._autoscaler = None
        self._children.stop()
        if self._s3 is not None:
            self._s3.sweep()
        self._redis = self._s3 = self._flower = None
        self._crew = None
        self._lock.release()

    def _open_site(self) -> Site:
        private_folder(self.data)
        self._lock.acquire()
        self._stop_requested = False
        try:
            credentials = Credentials.load_or_create(self.data / "credentials.json")
            ports = PortBook(self.data / "ports.json")
            return Site(self.data, ports, credentials, self._children, self._lock.descriptor)
        except BaseException:
            self._lock.release()
            raise

    def _start_servers(self, site: Site) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._redis = RedisServer(site, binary=self._redis_binary)
            self._s3 = S3Server(site)
            try:
                self._redis.start()
                self._s3.start()
                return wait_ready([self._redis, self._s3], SERVER_SECONDS)
            except PortTakenError:
                if attempt == _PORT_ATTEMPTS:
                    raise
                self._children.stop()
                site.ports.forget()

    def _start_clients(self, site: Site) -> None:
        environment = _child_environment(self.environment())
        if self._pace is not None:
            # What workers tell of themselves must be as fresh as the readings; a setting of the user's own comes first.
            environment = {"PIPEFLEET_WORKER_ANNOUNCE_SECONDS": str(self._pace.interval), **environment}
        self._crew = Crew(site, environment, command=self._worker_command, grace=WORKER_GRACE)
        if self._pace is not None:
            self._start_autoscaler(site, self._crew, self._pace)
        workers = [self._crew.start(pool) for pool in self._pools]
        if self._with_flower:
            self._flower = Flower(site, FLOWER_APP, broker_url=self.redis.url, environment=environment)
            self._flower.start()
        others: list[Service] = [] if self._flower is None else [self._flower]
        wait_ready([*workers, *others], WORKER_SECONDS if self._pools else SERVER_SECONDS)

    def _start_autoscaler(self, site: Site, crew: Crew, pace: Pace) -> None:
        from pipefleet.fleet import load_fleet
        from pipefleet.settings import Settings

        from .autoscale import Autoscaler

        assert self._fleet is not None
        port = site.ports.take(["scaler"])["scaler"] if pace.port is None else pace.port
        settings = Settings(redis_url=self.redis.url, fleet=self._fleet)
        fleet = load_fleet(self._fleet, allow_unpinned=True)  # the workers decide what is pinned
        autoscaler = Autoscaler(self._fleet, fleet, settings, pace, crew=crew, port=port)
        autoscaler.start()
        self._autoscaler = autoscaler

    def _revive(self) -> None:
        if self._crew is None:
            return
        self._crew.forget_drained()
        for child in self._children.dead():
            self._crew.revive(child)


def _started(part: _Part | None) -> _Part:
    if part is None:
        raise StackError("the stack is not running; call start() or use it as a context manager")
    return part


def _child_environment(own: dict[str, str]) -> dict[str, str]:
    """Return the environment of this process with `own`, no foreign services, and no proxy for loopback."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_PREFIXES)}
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), LOOPBACK]))
    return {**inherited, **own, "NO_PROXY": direct, "no_proxy": direct}
