"""Where the fuzzer runs: Redis and S3 of its own, one worker process, a client, and an ear on every channel of Redis."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.queues.celery import celery_app
from pipefleet.queues.keys import queue_lists
from pipefleet.queues.revision_notes import queues_of
from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.credentials import Credentials
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.part import Site, wait_ready
from pipefleet_workers.fleet.local.ports import PortBook
from pipefleet_workers.fleet.local.servers import BUCKET, REGION, RedisServer, S3Server
from tests.checkpoints import cached
from tests.fuzz import messages
from tests.fuzz.messages import GARBAGE, HOST_ITEMS, HOST_SHARDS, HOST_URI, QUEUE, SHARD_FILES, TASK, VICTIM_URI
from tests.servers import until

START_SECONDS = 120.0
VICTIM_ITEMS = 24
SETTINGS = {
    "lease_seconds": "3",
    "prefetch": "128",
    "shards": "4",
    "retries": "1",
    "announce_seconds": "2",
    "drain_seconds": "1",
    "allowed_uris": f"{messages.BASE},s3://{BUCKET}/store/",
    "max_object_bytes": "1048576",
}
"""The worker's settings: everything settles within seconds, and a few hundred messages fill what it may hold."""


class World:
    """Servers and one worker under a folder, which must be empty. `names` are what the marks in messages stand for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "worker.log"
        self.names: dict[str, str] = {}
        self._ready = folder / "worker.ready"

    def __enter__(self) -> World:
        with ExitStack() as stack:
            children = Children()
            stack.callback(children.stop)
            self._start_servers(children, stack)
            stack.enter_context(in_environment(self._environment()))
            self.redis = Redis.from_url(self._server.url, socket_timeout=30.0)
            self.client = stack.enter_context(Client())
            self.ear = stack.enter_context(Ear(self.redis).listening())
            stack.callback(self._end_worker)
            self._prepare_store()
            self._start_worker()
            self._run_victim()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    @property
    def pid(self) -> int:
        """The process id of the worker."""
        return self._worker.pid

    @property
    def exit_code(self) -> int | None:
        """How the worker ended; None while it lives."""
        return self._worker.poll()

    def memory(self, field: str) -> int:
        """Bytes of `VmRSS` (what the worker holds) or `VmHWM` (what it held at most)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))

    def forget_peak(self) -> None:
        """Let `VmHWM` begin anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def push(self, raw: Sequence[tuple[int, bytes]]) -> None:
        """Queue elements as they are, each in the list of its step, a hundred at once."""
        lists = queue_lists(QUEUE)
        for start in range(0, len(raw), 100):
            pipe = self.redis.pipeline(transaction=False)
            for step, one in raw[start : start + 100]:
                pipe.lpush(lists[step], one)
            pipe.execute()

    def objects(self) -> dict[str, str]:
        """The ETag of every object of the bucket, by key."""
        return {entry.key: str(entry.etag) for entry in self.client.store.list(f"s3://{BUCKET}/")}

    def ping(self) -> bool:
        """Whether the worker answers `celery inspect ping`."""
        self.ear.expected += 1
        answers: Any = self.celery.control.inspect(timeout=20.0, limit=1).ping()
        return bool(answers) and all(value == {"ok": "pong"} for value in answers.values())

    def _start_servers(self, children: Children, stack: ExitStack) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        credentials = Credentials.load_or_create(self.folder / "credentials.json")
        site = Site(self.folder, children, ports=PortBook(self.folder / "ports.json"), credentials=credentials)
        self._server, self._s3 = RedisServer(site), S3Server(site)
        stack.callback(self._s3.sweep)
        self._server.start()
        self._s3.start()
        wait_ready([self._server, self._s3], 60.0)
        model = json.dumps(str(cached(TASK)))
        (self.folder / "fleet.toml").write_text(f'[pools.texts]\ntask = "{TASK}"\nmodel = {model}\n')
        self.celery: Any = celery_app(self._settings())

    def _settings(self) -> Any:
        from pipefleet.settings import Settings

        return Settings(redis_url=self._server.url)

    def _environment(self) -> dict[str, str]:
        credentials = self._s3.credentials
        return {
            "PIPEFLEET_REDIS_URL": self._server.url,
            "PIPEFLEET_STORE": f"s3://{BUCKET}/store/",
            "PIPEFLEET_FLEET": str(self.folder / "fleet.toml"),
            "AWS_ENDPOINT_URL_S3": self._s3.endpoint,
            "AWS_ACCESS_KEY_ID": credentials.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": credentials.s3_secret_key,
            "AWS_REGION": REGION,
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def _prepare_store(self) -> None:
        """The host's run, planned and queued by nobody, half of its lists garbage; and lists of garbage beside it."""
        store = self.client.store
        rows = [f"host {place}" for place in range(HOST_SHARDS * HOST_ITEMS)]
        run = self.client.map(TASK, rows, output=HOST_URI, shard_size=HOST_ITEMS)
        run.join_planner()
        self.redis.delete(*(name for queue in queues_of(self.redis, QUEUE) for name in queue_lists(queue)))
        self.names |= {messages.HOST: run.id, messages.MODEL: run.plan.model}
        for place, (kind, content) in enumerate(GARBAGE.items()):
            store.put(f"{SHARD_FILES}{kind}.jsonl", content)
            store.put(RunLayout(HOST_URI).shard(2 * place + 1), content)

    def _run_victim(self) -> None:
        rows = [f"victim {place}" for place in range(VICTIM_ITEMS)]
        run = self.client.map(TASK, rows, output=VICTIM_URI, shard_size=8)
        assert run.wait(timeout=60).state == "succeeded"
        self.names[messages.VICTIM] = run.id

    def _start_worker(self) -> None:
        command = [sys.executable, "-m", "pipefleet", "worker", "--pool", "texts", "--threads", "1"]
        own = {f"PIPEFLEET_WORKER_{name.upper()}": value for name, value in SETTINGS.items()}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PIPEFLEET_WORKER_")}
        with self.log.open("ab") as log:
            self._worker = subprocess.Popen(
                [*command, "--ready-file", str(self._ready)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**inherited, **own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip

        def ready() -> bool:
            assert self._worker.poll() is None, self.log.read_text()[-2000:]
            return self._ready.exists()

        until(ready, START_SECONDS)

    def _end_worker(self) -> None:
        if hasattr(self, "_worker"):
            self._worker.kill()
            self._worker.wait()


class Ear:
    """Counts what is published, by channel. `expected` is how many control messages the harness itself has sent."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._ended = threading.Event()
        self.heard: Counter[str] = Counter()
        self.expected = 0

    @contextmanager
    def listening(self) -> Iterator[Ear]:
        """Listen inside the block."""
        channel: Any = self._redis.pubsub()  # type: ignore[no-untyped-call]
        with channel:
            channel.psubscribe("*")
            thread = threading.Thread(target=self._listen, args=(channel,), name="fuzz-ear", daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._ended.set()
                thread.join(10)

    def _listen(self, channel: Any) -> None:
        while not self._ended.is_set():
            message = channel.get_message(ignore_subscribe_messages=True, timeout=0.5)
            if message is not None:
                self.heard[message["channel"].decode(errors="backslashreplace")] += 1


def soon(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until `condition` holds; False when it did not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met
