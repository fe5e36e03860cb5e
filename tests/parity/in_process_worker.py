"""A worker of one pool inside this process: everything but Celery's own loop, on real Redis and S3."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from kombu import Connection, Consumer, Queue

from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.routing import queue_name, work_queue
from pipefleet.queues.keys import PRIORITY_SEPARATOR, PRIORITY_STEPS, ledger_keys, queue_list
from pipefleet.settings import Settings
from pipefleet_workers.build import Built, build
from pipefleet_workers.consume.held import Delivery
from pipefleet_workers.delivery.leases import Lease, lease_of
from pipefleet_workers.ending import Ending
from pipefleet_workers.settings import WorkerSettings

TRANSPORT = "pipefleet_workers.delivery.transport:Transport"


class LeaseDelivery:
    """A delivery that is settled by its lease alone."""

    def __init__(self, name: str, payload: Any, lease: Lease) -> None:
        self.id = name
        self.payload = payload
        self.priority = 3
        self.deliveries = lease.deliveries
        self.retries = 0
        self.revoked = False
        self.deadline: float | None = None
        self.lease = lease

    @property
    def lost(self) -> bool:
        return self.lease.lost

    def started(self, *, quick: bool = False) -> None:
        """Nobody is told."""

    def done(self, ending: Ending) -> None:
        self.lease.ack()

    def give_back(self, delay: float = 0.0) -> None:
        self.lease.give_back(delay)

    def hand_over(self, queue: str) -> None:
        self.lease.hand_over(queue, queue_list(queue, self.priority))

    def refuse(self, reason: str) -> None:
        self.lease.dead_letter(reason)


@contextlib.contextmanager
def working(fleet: Fleet, pool: Pool, settings: Settings) -> Iterator[Built]:
    """A worker that serves `pool` until the block ends; the `Built` one."""
    queue = queue_name(pool, fleet)
    queues = [Queue(queue), Queue(work_queue(pool, fleet))]
    built = build(pool, settings, WorkerSettings(warm_up=False), queue=queue, device="cpu", name=f"{pool.name}@test")
    built.consumer.start()
    stopped = threading.Event()
    thread = threading.Thread(target=_consume, args=(queues, settings, built, stopped), daemon=True)
    thread.start()
    try:
        yield built
    finally:
        stopped.set()
        thread.join(30)
        built.consumer.drain(1.0)


def _consume(queues: list[Queue], settings: Settings, built: Built, stopped: threading.Event) -> None:
    options: dict[str, Any] = {"priority_steps": list(PRIORITY_STEPS), "sep": PRIORITY_SEPARATOR}

    def received(body: Any, message: Any) -> None:
        lease = lease_of(message)
        assert lease is not None
        delivery: Delivery = LeaseDelivery(message.headers["id"], body[0][0], lease)
        built.consumer.take(delivery)

    options |= ledger_keys(queues[0].name) | {"on_dead": built.bury}
    with Connection(settings.redis_url, transport=TRANSPORT, transport_options=options) as connection:
        with Consumer(connection.channel(), queues, callbacks=[received], accept=["json"], prefetch_count=64):
            while not stopped.is_set():
                with contextlib.suppress(TimeoutError):
                    connection.drain_events(timeout=0.2)
