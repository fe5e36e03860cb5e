"""All of pipefleet on one machine: a Redis-compatible server, an S3 server, workers, Flower, and a scaler if wanted.

    start: lock ─▶ ports, credentials ─▶ servers ─▶ Flower ─▶ workers, scaler        supervise: step, again and again
    stop:  workers drain ─▶ Flower and servers ─▶ lock

`pipefleet up`, the demo and the tests call it. A part that cannot start or go on raises StackError.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from redis.exceptions import RedisError

from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.credentials import Credentials
from pipefleet_workers.fleet.local.edits import FleetEdits
from pipefleet_workers.fleet.local.errors import PortTakenError, StackError
from pipefleet_workers.fleet.local.files import env_lines, private_folder, write_private
from pipefleet_workers.fleet.local.flower import Flower
from pipefleet_workers.fleet.local.follow import Follower, outstanding
from pipefleet_workers.fleet.local.lock import DataLock
from pipefleet_workers.fleet.local.parked import TOLD_SECONDS, Parked, tell_parked
from pipefleet_workers.fleet.local.part import Part, Site, wait_ready
from pipefleet_workers.fleet.local.ports import LOOPBACK, PortBook
from pipefleet_workers.fleet.local.servers import BUCKET, REGION, RedisServer, S3Server
from pipefleet_workers.fleet.local.workers import Crew, WorkerCommand, WorkerProcess, worker_command
from pipefleet_workers.observe.logs import say

if TYPE_CHECKING:
    from pipefleet_workers.fleet.local.autoscale import Autoscaler, Pace

_Part = TypeVar("_Part", RedisServer, S3Server)

FLOWER_APP = "pipefleet.flower:app"
SERVER_SECONDS = 30.0
WORKER_SECONDS = 300.0
WORKER_GRACE = 20.0
_PORT_ATTEMPTS = 3
_WATCH_SECONDS = 0.1
_POLL_SECONDS = 0.03
# Variables of the caller's shell about other brokers, stores and dashboards must not reach the children.
_FOREIGN_PREFIXES = ("AWS_", "CELERY_", "FLOWER_")


class Stack:
    """Everything under one data directory, on loopback, with generated credentials; a context manager.

    `pools` has one pool name per worker process (repeat it for several workers of a pool); none by default. `fleet` is the fleet
    file that the workers read. `redis_binary` overrides the choice of `RedisServer`. `worker_command` and `clock` (monotonic
    seconds) are for tests.

        with Stack(Path(".pipefleet"), fleet=Path("fleet.toml"), pools=["speech"]) as stack:
            stack.supervise()

    One thread at a time may call it, except `request_stop` and `request_reload`, which any thread or signal handler may call. On
    Linux no process that it started survives this process, however it ends.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.data = data.absolute()
        self._fleet = fleet.absolute() if fleet is not None else None
        self._pools = tuple(pools)
        self._with_flower = flower
        self._redis_binary = redis_binary
        self._worker_command = worker_command
        self._clock = clock
        self._children = Children()
        self._lock = DataLock(self.data / "lock")
        self._stop_requested = False
        self._reload_requested = False
        self._file: FleetEdits | None = None
        self._least = 1
        self._follower: Follower | None = None
        self._told: Mapping[str, Parked] = {}
        self._tell_at = 0.0
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
        """Flower; None without it."""
        return self._flower

    @property
    def scaler_url(self) -> str | None:
        """The URL of the scaler; None without a scaler."""
        return None if self._autoscaler is None else self._autoscaler.url

    def follow(self, file: FleetEdits, *, least: int = 1) -> Self:
        """Run the pools of `file`, each with `least` workers or its `workers.min`, and let `supervise` take its changes.

        A pool whose workers do not start then does not stop the others. `pools` of the stack must be empty. Returns itself.
        """
        self._file, self._least, self._fleet = file, least, file.path
        return self

    @property
    def silent_pools(self) -> list[str]:
        """The pools that should have workers but have none that is ready."""
        return [] if self._crew is None else self._crew.silent_pools()

    def autoscale(self, pace: Pace) -> Self:
        """From `start` on, let `supervise` start and drain workers by the work, within the fleet file's limits. Returns itself.

        `pools` are the first workers. Raises StackError without a fleet file.
        """
        if self._fleet is None:
            raise StackError("autoscaling needs a fleet file: it says how many workers a pool may have")
        self._pace = pace
        return self

    def start(self) -> None:
        """Start everything and return once it answers; on any error or interrupt, stop the started parts.

        Raises StackError when the data directory is in use, a program is missing, or a part ends or is not ready in time (servers
        and Flower 30 s, workers 300 s); UsageError when the scaler's port is in use. With a fleet file to follow, one ready worker
        is enough: `supervise` looks after the others.
        """
        site = self._open_site()
        try:
            self._start_servers(site)
            self._forget_store()
            self._start_clients(site)
        except BaseException:
            self.stop()
            raise

    def environment(self) -> dict[str, str]:
        """The variables that a client or worker needs in its environment. Raises StackError unless started."""
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

    def request_reload(self) -> None:
        """Make `supervise` read the fleet file now and try parked workers again; safe in a signal handler."""
        self._reload_requested = True

    def supervise(self) -> None:
        """Block until `request_stop` is called; call `step` again and again. Raises its StackErrors."""
        while not self._stop_requested:
            self.step()
            time.sleep(_WATCH_SECONDS)

    def step(self) -> None:
        """Look once after everything: restart ended workers after pauses, follow the fleet file, autoscale if wanted.

        Raises StackError, with the end of its log, when a part other than a worker has ended.
        """
        if self._crew is None:
            return
        for child in self._children.dead():
            if not self._crew.has(child):
                raise StackError(child.epitaph())
        self._crew.step()
        if self._follower is not None:
            reload, self._reload_requested = self._reload_requested, False
            self._follower.step(self._crew, reload=reload)
        if self._autoscaler is not None:
            self._autoscaler.step()
        self._tell_parked(self._crew.parked())

    def stop(self) -> None:
        """End the workers (20 s for their jobs), then all other parts, and release the lock.

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
        self._crew = self._follower = None
        self._lock.release()

    def _open_site(self) -> Site:
        private_folder(self.data)
        self._lock.acquire()
        self._stop_requested = self._reload_requested = False
        self._told, self._tell_at = {}, self._clock()
        try:
            credentials = Credentials.load_or_create(self.data / "credentials.json")
            ports = PortBook(self.data / "ports.json")
            return Site(self.data, self._children, self._lock.descriptor, ports=ports, credentials=credentials)
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

    def _forget_store(self) -> None:
        """Let the first worker note the store again: this Redis serves only this store, even if the store's folder was emptied."""
        from pipefleet.queues.keys import FLEET_KEY

        try:
            self._connection().delete(FLEET_KEY)
        except RedisError as error:
            raise StackError(
                f"the stack's Redis takes no writes ({type(error).__name__}); see {self.data}/logs"
            ) from error

    def _start_clients(self, site: Site) -> None:
        environment = _child_environment(self.environment())
        if self._pace is not None:
            # Announcements of workers must be as fresh as the readings; the user's own setting wins.
            environment = {"PIPEFLEET_WORKER_ANNOUNCE_SECONDS": str(self._pace.interval), **environment}
        self._crew = crew = Crew(site, environment, command=self._worker_command, grace=WORKER_GRACE, clock=self._clock)
        if self._pace is not None:
            self._start_autoscaler(site, crew, self._pace)
        workers = self._start_workers(site, crew)
        if self._with_flower:
            self._flower = Flower(site, FLOWER_APP, broker_url=self.redis.url, environment=environment)
            self._flower.start()
        others: list[Part] = [] if self._flower is None else [self._flower]
        if self._follower is None:
            return wait_ready([*workers, *others], WORKER_SECONDS if workers else SERVER_SECONDS)
        _wait_for_one(workers, WORKER_SECONDS)
        wait_ready(others, SERVER_SECONDS)
        self.step()

    def _start_workers(self, site: Site, crew: Crew) -> list[WorkerProcess]:
        if self._file is None:
            return [crew.start(pool) for pool in self._pools]
        redis, url = self._connection(), self.redis.url
        self._follower = Follower(
            self._file,
            site.folder("run"),
            least=self._least,
            outstanding=lambda queues: outstanding(redis, url, queues),
            changed=self._autoscaler.follow if self._autoscaler is not None else lambda path, fleet: None,
            believed=self._believed(),
            clock=self._clock,
        )
        return self._follower.begin(crew)

    def _believed(self) -> float:
        """The seconds for which clients may believe an announcement that a worker made before the fleet file changed."""
        from pipefleet.fleet.latest import LOOK_SECONDS
        from pipefleet_workers.settings import load_worker_settings

        scaler = 0.0 if self._autoscaler is None else self._autoscaler.announced_seconds
        # Within two intervals every worker has announced the change; its earlier announcement expires after three more.
        return LOOK_SECONDS + max(5 * load_worker_settings().announce_seconds, scaler)

    def _start_autoscaler(self, site: Site, crew: Crew, pace: Pace) -> None:
        from pipefleet.fleet.file import load_fleet
        from pipefleet.settings import Settings
        from pipefleet_workers.fleet.local.autoscale import Autoscaler

        assert self._fleet is not None
        port = site.ports.take(["scaler"])["scaler"] if pace.port is None else pace.port
        settings = Settings(redis_url=self.redis.url, fleet=self._fleet)
        fleet = load_fleet(self._fleet, allow_unpinned=True)  # the workers decide what is pinned
        autoscaler = Autoscaler(self._fleet, fleet, settings, pace, crew=crew, port=port)
        autoscaler.start()
        self._autoscaler = autoscaler

    def _tell_parked(self, parked: Mapping[str, Parked]) -> None:
        """Write parked pools for `top` and `doctor`: when they change, and again before the entries expire."""
        if parked == self._told and (not parked or self._clock() < self._tell_at):
            return
        try:
            tell_parked(self._connection(), parked)
        except RedisError:
            return  # `step` watches the server like every other part
        self._told, self._tell_at = parked, self._clock() + TOLD_SECONDS / 3

    def _connection(self) -> Any:
        """A connection to the stack's Redis that does not wait long."""
        from pipefleet.connection.connect import connect
        from pipefleet.settings import Settings

        return connect(Settings(redis_url=self.redis.url, redis_timeout=1.0))


def _wait_for_one(workers: Sequence[WorkerProcess], timeout: float) -> None:
    """Return once each of `workers` is ready or has ended, or after `timeout` s. Raises StackError if none is ready then."""
    deadline = time.monotonic() + timeout
    starting = list(workers)
    while starting and time.monotonic() < deadline:
        starting = [worker for worker in starting if not worker.answers() and not worker.ended()]
        time.sleep(_POLL_SECONDS)
    if workers and not any(worker.answers() for worker in workers):
        for worker in workers:
            worker.ready()  # raises if the worker has ended
        raise StackError(f"not ready after {timeout:g} s: {', '.join(one.name for one in workers)}; read their logs")
    for worker in starting:
        say(f"{worker.name} is not ready after {timeout:g} s; its log tells how far it is", trouble=True)


def _started(part: _Part | None) -> _Part:
    if part is None:
        raise StackError("the stack is not running; call start() or use it as a context manager")
    return part


def _child_environment(own: dict[str, str]) -> dict[str, str]:
    """The environment of this process with `own`, without foreign services, and without a proxy for loopback."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN_PREFIXES)}
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), LOOPBACK]))
    return {**inherited, **own, "NO_PROXY": direct, "no_proxy": direct}
