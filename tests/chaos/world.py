"""The world of the suite: a Redis and an S3 server of its own, a proxy before the latter, and workers that are started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redis import Redis

from pipefleet.client import Client
from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.credentials import Credentials
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.part import Site, wait_ready
from pipefleet_workers.fleet.local.ports import PortBook
from pipefleet_workers.fleet.local.servers import BUCKET, REGION, RedisServer, S3Server
from tests.chaos.agreement import check_agreement, stored
from tests.chaos.events import Events
from tests.chaos.proxy import WELL, Proxy
from tests.chaos.saboteur import TASK
from tests.checkpoints import cached

POOL = "texts"
QUEUE = f"pipefleet.{TASK}"
START_SECONDS = 120.0


def until(condition: Callable[[], Any], seconds: float = 60.0, *, what: str = "the condition") -> Any:
    """The first true value of `condition`. Raises AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)
    return value


@dataclass(eq=False)
class Worker:
    """One worker of the world. `codes` are the exit codes of its processes so far."""

    number: int
    environment: dict[str, str]
    supervised: bool = True
    pid: int = 0
    codes: list[int] = field(default_factory=list)
    ready_file: Path = Path()

    @property
    def ready(self) -> bool:
        return self.ready_file.exists() and self.ready_file.read_text().strip() == str(self.pid)

    def send(self, number: signal.Signals) -> None:
        if self.pid:
            with suppress(ProcessLookupError):  # it has ended by itself, and nobody has told so yet
                os.kill(self.pid, number)


class World:
    """Servers and workers under one folder. `transport` is the workers' transport."""

    def __init__(self, folder: Path, *, transport: str = "lease", seed: int = 0, lease: float | None = None) -> None:
        self.folder = folder
        self.transport = transport
        self.seed = seed
        self.lease = lease
        self._children = Children()
        folder.mkdir(parents=True, exist_ok=True)
        ports = PortBook(folder / "ports.json")
        site = Site(
            folder, self._children, ports=ports, credentials=Credentials.load_or_create(folder / "credentials.json")
        )
        self.redis_server, self.s3_server = RedisServer(site), S3Server(site)
        self._lock = threading.RLock()
        self.workers: list[Worker] = []
        self._waiting: list[Worker] = []
        self._count = 0
        self._sabotage = folder / "sabotage"
        self._away: set[str] = set()

    def __enter__(self) -> World:
        with ExitStack() as stack:
            stack.callback(self._end)
            self._start()
            self._environment = stack.enter_context(in_environment(self.environment()))
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @property
    def lease_seconds(self) -> float:
        """The lease of this world's workers, in seconds."""
        return self.lease or 20.0

    @property
    def redis(self) -> Redis:
        """A client that waits for a server which is away for a moment."""
        return self._redis

    @property
    def faults(self) -> set[str]:
        """What was not there all the time since the scene began: `redis`, `s3`, or a worker by its `death`."""
        died = any(code for worker in self.workers for code in worker.codes)
        return {*self._away, *(["s3"] if self.proxy.misbehaved else []), *(["death"] if died else [])}

    @property
    def ran(self) -> list[str]:
        """Every text that was forwarded, as often as it was."""
        file = self._sabotage / "ran"
        return file.read_text().splitlines() if file.exists() else []

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        credentials = self.s3_server.credentials
        return {
            "PIPEFLEET_REDIS_URL": self.redis_server.url,
            "PIPEFLEET_STORE": f"s3://{BUCKET}/store/",
            "PIPEFLEET_FLEET": str(self.folder / "fleet.toml"),
            "AWS_ENDPOINT_URL_S3": self.s3_server.endpoint,
            "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
            "AWS_REGION": REGION,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    @contextmanager
    def scene(self, workers: int = 2, **settings: Any) -> Iterator[Client]:
        """A client, `workers` workers with these settings, an empty Redis, and nothing left of the scenario before."""
        self._redis.flushall()
        shutil.rmtree(self._sabotage, ignore_errors=True)
        self._sabotage.mkdir()
        self.proxy.behave(WELL)
        self.proxy.misbehaved = False
        self._away.clear()
        try:
            with Events(self.redis_server.url) as self.events, Client() as client:
                self.stored_before = stored(client)
                for _ in range(workers):
                    self.add_worker(**settings)
                self.wait_ready()
                yield client
                check_agreement(self, client)
        finally:
            self.proxy.behave(WELL)
            self.clear_workers()

    def add_worker(
        self, *, supervised: bool = True, clock: float = 0.0, s3: str | None = None, **settings: Any
    ) -> Worker:
        """Start one more worker; `settings` are PIPEFLEET_WORKER_* in small letters, `clock` the error of its clock in seconds.

        `s3` is the URL of its own way to the object store.
        """
        self._count += 1
        lease = {"lease_seconds": self.lease} if self.lease else {}
        defaults: dict[str, object] = {"transport": self.transport, "announce_seconds": 2, **lease}
        values = {f"PIPEFLEET_WORKER_{name.upper()}": str(value) for name, value in {**defaults, **settings}.items()}
        own = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PIPEFLEET_WORKER_")},
            **self.environment(), **values,
            "AWS_ENDPOINT_URL_S3": s3 or self.proxy.endpoint, "CHAOS_FOLDER": str(self._sabotage), "CHAOS_CLOCK": str(clock),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        worker = Worker(self._count, own, supervised, ready_file=self.folder / f"worker-{self._count}.ready")
        with self._lock:
            self.workers.append(worker)
            self._launch(worker)
        return worker

    def wait_ready(self) -> None:
        """Wait until every worker consumes."""

        def ready() -> bool:
            hopeless = [worker.number for worker in self.workers if len(worker.codes) > 5]
            assert not hopeless, f"worker {hopeless} does not start; see its log in {self.folder}"
            return all(worker.ready for worker in self.workers)

        until(ready, START_SECONDS, what="workers are ready")

    def clear_workers(self) -> None:
        """End all workers at once."""
        with self._lock:
            workers, self.workers = self.workers, []
            for worker in workers:
                worker.supervised = False
        for worker in workers:
            if worker.pid:
                worker.send(signal.SIGKILL)
        until(lambda: not any(worker.pid for worker in workers), what="workers have ended")

    def order_death(self, point: str) -> None:
        """The next worker that passes `point` dies there."""
        (self._sabotage / f"kill-{point}").touch()

    def died_at(self, point: str) -> bool:
        """Whether the order was carried out."""
        return not (self._sabotage / f"kill-{point}").exists()

    def pause_redis(self, seconds: float) -> None:
        """Stop the server's process for a while."""
        self._away.add("redis")
        self._pause(self.redis_server.child, seconds)

    def pause_s3(self, seconds: float) -> None:
        """Stop the object store's process for a while."""
        self._away.add("s3")
        self._pause(self.s3_server.child, seconds)

    def restart_redis(self, *, keep: bool = True, away: float = 0.0) -> None:
        """Kill the server and start it again after `away` seconds, with its data or without."""
        self._away.add("redis")
        child = self.redis_server.child
        assert child is not None
        child.finish()
        time.sleep(away)
        if not keep:
            shutil.rmtree(self.folder / "redis" / "appendonlydir")
        child.start()
        wait_ready([self.redis_server], 30.0)

    def stop_s3(self, away: float) -> None:
        """End the object store's process, and start it again after `away` seconds."""
        self._away.add("s3")
        child = self.s3_server.child
        assert child is not None
        child.terminate()
        deadline = time.monotonic() + 1.6
        while not child.ended() and time.monotonic() < deadline:
            time.sleep(0.02)
        child.finish()
        time.sleep(away)
        child.start()
        wait_ready([self.s3_server], 60.0)

    def _pause(self, child: Any, seconds: float) -> None:
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGCONT)

    def _start(self) -> None:
        model = json.dumps(str(cached(TASK)))
        (self.folder / "fleet.toml").write_text(f'[pools.{POOL}]\ntask = "{TASK}"\nmodel = {model}\n')
        self.redis_server.start()
        self.s3_server.start()
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
                 "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        wait_ready([self.redis_server, self.s3_server], 60.0)
        self.proxy = Proxy(int(self.s3_server.endpoint.rsplit(":", 1)[1]), seed=self.seed)
        self._redis = Redis.from_url(self.redis_server.url, socket_timeout=30.0)
        threading.Thread(target=self._listen, name="chaos-nursery", daemon=True).start()

    def _end(self) -> None:
        if hasattr(self, "_nursery"):
            self.workers.clear()
            assert self._nursery.stdin is not None
            self._nursery.stdin.close()  # its workers end with it
            self._nursery.wait(30)
        self._children.stop()
        self.s3_server.sweep()

    def _launch(self, worker: Worker) -> None:
        worker.ready_file.unlink(missing_ok=True)
        request: dict[str, Any] = {"log": str(self.folder / f"worker-{worker.number}.log")}
        arguments: Sequence[str] = ("worker", "--pool", POOL, "--threads", "1", "--ready-file", str(worker.ready_file))
        request.update(environment=worker.environment, arguments=arguments)
        assert self._nursery.stdin is not None
        self._waiting.append(worker)
        self._nursery.stdin.write(json.dumps(request).encode() + b"\n")
        self._nursery.stdin.flush()

    def _listen(self) -> None:
        assert self._nursery.stdout is not None
        by_pid: dict[int, Worker] = {}
        for line in self._nursery.stdout:
            said = json.loads(line)
            with self._lock:
                if "started" in said:
                    worker = by_pid[said["started"]] = self._waiting.pop(0)
                    worker.pid = said["started"]
                elif "ended" in said:
                    self._ended(by_pid.pop(said["ended"]), said["code"])

    def _ended(self, worker: Worker, code: int) -> None:
        worker.pid = 0
        worker.codes.append(code)
        if worker.supervised:
            self._launch(worker)
