"""What the tests of Celery's view share: a real Celery worker in a thread, around a consumer that does as it is told."""

from __future__ import annotations

import json
import threading
from typing import Any

from celery.worker import WorkController, state
from redis import Redis

from pipefleet.contract.messages import TASK_NAME, JobMessage, Priority
from pipefleet.queues.celery import celery_app, celery_message
from pipefleet.queues.keys import ledger_keys, queue_list
from pipefleet.settings import Settings
from pipefleet_workers.consume import control
from pipefleet_workers.consume.celery_task import InferTask, register_alone
from tests.chaos.events import Events, listeners
from tests.servers import Server
from tests.unit.conftest import eventually
from tests.unit.worker.consume.fakes import Bench

QUEUE = "pipefleet.test"
NAME = "texts@test"


class Controller(WorkController):  # type: ignore[misc]
    """A worker that runs in a thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ready = threading.Event()
        super().__init__(*args, **kwargs)

    def on_consumer_ready(self, consumer: Any) -> None:
        self.ready.set()


class Fleet:
    """One Celery worker around a bench, and who looks at it."""

    def __init__(self, server: Server, bench: Bench, events: Events) -> None:
        self.bench, self.events = bench, events
        self.redis = Redis(port=server.port)
        self._others = {client["id"] for client in self.redis.client_list()}
        self.refused: list[tuple[Any, str]] = []
        settings = Settings(redis_url=server.url)
        options = {"lease_seconds": 5.0, "sweep_seconds": 0.1, "only_tasks": [TASK_NAME]}
        self.app = celery_app(
            settings, queue=QUEUE, transport="pipefleet_workers.delivery.transport:Transport", options=options
        )
        self.app.conf.worker_hijack_root_logger = False
        members = {"name": TASK_NAME, "consumer": bench.consumer, "refused": staticmethod(self._refuse)}
        self.task = type("Infer", (InferTask,), members)()
        register_alone(self.app, self.task)
        control.install()
        self.worker = Controller(
            app=self.app, pool="solo", concurrency=1, prefetch_multiplier=16, hostname=NAME, loglevel="ERROR",
            without_gossip=True, without_mingle=True, task_events=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.worker.start, daemon=True)

    def start(self) -> None:
        """Start the worker, and wait until it hears commands.

        It is not pinged: kombu counts a late answer to an earlier ping towards the limit of the next question.
        """
        before = listeners(self.redis)
        self.thread.start()
        assert self.worker.ready.wait(20)
        assert eventually(lambda: bool(listeners(self.redis) - before)), "it takes no commands"

    def lose_connections(self) -> None:
        """The server drops what the worker waits at, and none of those who look at it."""
        for client in self.redis.client_list():
            if (
                client["cmd"] in ("blmove", "eval", "brpop", "subscribe", "psubscribe")
                and client["id"] not in self._others
            ):
                self.redis.client_kill_filter(client["id"])

    def _refuse(self, payload: Any, reason: str) -> None:
        assert threading.current_thread() is not self.thread, "Redis is asked in the event loop"
        self.refused.append((payload, reason))

    def put(self, message: JobMessage, **headers: Any) -> str:
        """Queue a job, with Celery's headers as a foreign client may set them."""
        text = celery_message(message, QUEUE, Priority.NORMAL)
        if headers:
            envelope = json.loads(text)
            envelope["headers"].update(headers)
            text = json.dumps(envelope)
        self.redis.lpush(queue_list(QUEUE, Priority.NORMAL), text)
        return str(headers.get("id", message.id))

    def inspect(self, what: str) -> list[str]:
        """The ids that `celery inspect` lists."""
        answer = getattr(self.app.control.inspect([NAME], timeout=10, limit=1), what)()
        return [one["id"] for one in answer[NAME]]

    def shows(self, job_id: str, wanted: str) -> bool:
        return eventually(lambda: self.events.shown(job_id) == wanted)

    @property
    def empty(self) -> bool:
        """Nothing of ours is in Redis or in Celery's books."""
        keys = ledger_keys(QUEUE)
        left = [
            name
            for name in ("unacked", "owners", "deliveries", "unacked_index")
            if self.redis.exists(keys[f"{name}_key"])
        ]
        books = (state.requests, state.reserved_requests, state.active_requests, state.scheduled_requests)
        return not left and not any(len(book) for book in books)


def revoke(one: Fleet, job_id: str, **options: Any) -> None:
    (answer,) = one.app.control.revoke(job_id, reply=True, timeout=20, limit=1, **options)
    assert answer[NAME]["ok"].endswith(job_id)
