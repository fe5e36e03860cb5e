"""A worker of one pool inside this process: everything but Celery's own loop, on real Redis and S3."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from kombu import Connection, Consumer, Queue

from pipefleet import broker
from pipefleet.fleet import Fleet, Pool
from pipefleet.routing import queue_name, work_queue
from pipefleet.settings import Settings
from pipefleet_workers.build import build
from pipefleet_workers.delivery.leases import Lease, lease_of
from pipefleet_workers.settings import WorkerSettings

TRANSPORT = "pipefleet_workers.delivery.transport:Transport"


class LeaseDelivery:
    """A delivery that is settled by its lease alone."""

    def __init__(self, payload: Any, lease: Lease, consumer: Any) -> None:
        self.payload = payload
        self.priority = 3
        self.deliveries = lease.deliveries
        self.retries = 0
        self._lease = lease
        self._consumer = consumer

    @property
    def lost(self) -> bool:
        return self._lease.lost

    def started(self) -> None:
        """Nobody is told."""

    def done(self, state: str) -> None:
        self._lease.ack()
        self._consumer.ended()

    def give_back(self) -> None:
        self._lease.give_back()
        self._consumer.ended()

    def hand_over(self, queue: str) -> None:
        self._lease.hand_over(queue, broker.queue_list(queue, self.priority))
        self._consumer.ended()

    def refuse(self, reason: str) -> None:
        self._lease.dead_letter(reason)
        self._consumer.ended()


@contextlib.contextmanager
def working(fleet: Fleet, pool: Pool, settings: Settings) -> Iterator[Any]:
    """A worker that serves `pool` until the block ends; the `Built` one."""
    queue = queue_name(pool, fleet)
    queues = [Queue(queue), Queue(work_queue(pool, fleet))]
    built = build(pool, settings, WorkerSettings(warm_up=False), queue=queue, device="cpu", name=f"{pool.name}@test")
    built.consumer.start()
    stopped = threading.Event()
    thread = threading.Thread(target=_consume, args=(queues, settings, built.consumer, stopped), daemon=True)
    thread.start()
    try:
        yield built
    finally:
        stopped.set()
        thread.join(30)
        built.consumer.drain(1.0)


def _consume(queues: list[Queue], settings: Settings, consumer: Any, stopped: threading.Event) -> None:
    options = {"priority_steps": list(broker.PRIORITY_STEPS), "sep": broker.PRIORITY_SEPARATOR}

    def received(body: Any, message: Any) -> None:
        lease = lease_of(message)
        assert lease is not None
        consumer.take(LeaseDelivery(body[0][0], lease, consumer))

    options |= broker.unacked_keys(queues[0].name)
    with Connection(settings.redis_url, transport=TRANSPORT, transport_options=options) as connection:
        with Consumer(connection.channel(), queues, callbacks=[received], accept=["json"], prefetch_count=64):
            while not stopped.is_set():
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)
