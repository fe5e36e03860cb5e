"""`Events`: what Celery's workers tell, collected as Flower collects it."""

from __future__ import annotations

import threading
import time
from typing import Any

from celery import Celery
from celery.events.state import State
from redis import Redis
from redis.exceptions import RedisError


class Events:
    """Listens from `__enter__` to `__exit__`, also again after the server was away. `state` is what Flower would show."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.app = Celery("events", broker=url, set_as_current=False)
        self.state = State(max_tasks_in_memory=1_000_000)
        self.told: list[dict[str, Any]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="events", daemon=True)

    def __enter__(self) -> Events:
        with Redis.from_url(self._url) as redis:
            before = listeners(redis)
            self._thread.start()
            deadline = time.monotonic() + 20
            while not listeners(redis) - before and time.monotonic() < deadline:
                time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(20)

    def shown(self, job_id: str) -> str | None:
        """The state that Flower would show of a job, None for one it knows nothing of."""
        task = self.state.tasks.get(job_id)
        return None if task is None else task.state

    def of(self, job_id: str) -> list[str]:
        """The types of the events of one job, in the order in which they came."""
        return [event["type"] for event in self.told if event.get("uuid") == job_id]

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                with self.app.connection() as connection:
                    receiver = self.app.events.Receiver(connection, handlers={"*": self._take})
                    with receiver.consumer_context() as (listening, *_):  # it makes a connection of its own
                        while not self._ended.is_set():
                            _drain(listening)
            except (*self.app.connection().connection_errors, OSError):
                self._ended.wait(0.2)

    def _take(self, event: dict[str, Any]) -> None:
        self.told.append(dict(event))
        self.state.event(event)


def _drain(connection: Any) -> None:
    try:
        connection.drain_events(timeout=0.2)
    except TimeoutError:
        return


def listeners(redis: Redis) -> set[str]:
    """The connections that listen to channels by pattern, as those of events and of control commands do."""
    try:
        return {client["id"] for client in redis.client_list() if client["psub"] != "0"}
    except RedisError:
        return set()
