"""What the tests of the lease transport share: a server of their own that can be killed, and workers made of plain kombu."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kombu import Connection, Consumer, Queue
from redis import Redis

from pipefleet.queues import dead_letters
from pipefleet.queues.keys import PRIORITY_SEPARATOR, PRIORITY_STEPS, ledger_keys
from pipefleet.queues.looking import message_id, queue_depth
from pipefleet_workers.delivery.leases import Lease, lease_of
from tests.servers import until

QUEUE = "pipefleet.test"
TRANSPORT = "pipefleet_workers.delivery.transport:Transport"
NEVER = 1000.0


def transport_options(**options: Any) -> dict[str, Any]:
    """As a worker has them, with a lease short enough for a test."""
    return {
        **ledger_keys(QUEUE),
        "priority_steps": list(PRIORITY_STEPS),
        "sep": PRIORITY_SEPARATOR,
        "queue_order_strategy": "priority",
        "lease_seconds": 1.0,
        "sweep_seconds": 0.1,
        **options,
    }


@dataclass
class Taker:
    """A worker of plain kombu that takes messages when it is told to; `lost` and `dead` are what it was told."""

    url: str
    prefetch: int = 100
    options: dict[str, Any] = field(default_factory=dict)
    connect: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.messages: list[Any] = []
        self.lost: list[Lease] = []
        self.dead: list[dead_letters.DeadLetter] = []
        self.on_message: Callable[[Any], None] = self.messages.append
        callbacks = {"on_lost": self.lost.append, "on_dead": self.dead.append}
        # Bound to this taker, so that two takers in one process have a ledger each, as two workers would.
        options = transport_options(**{**{name: _Own(self, call) for name, call in callbacks.items()}, **self.options})
        self.connection = Connection(self.url, transport=TRANSPORT, transport_options=options, **self.connect)
        self.channel: Any = self.connection.channel()
        self.channel.basic_qos(0, self.prefetch, False)
        self.consumer = Consumer(
            self.channel, [Queue(QUEUE)], on_message=lambda message: self.on_message(message), accept=["json"]
        )
        self.consumer.consume()

    def poll(self, seconds: float = 0.05) -> None:
        """Take what comes within `seconds`."""
        try:
            self.connection.drain_events(timeout=seconds)
        except TimeoutError:
            return

    def take(self, count: int, seconds: float = 20.0) -> list[Any]:
        """The next `count` messages."""
        start = len(self.messages)
        until(lambda: (self.poll(), len(self.messages) >= start + count)[1], seconds)
        return self.messages[start:]

    def leases(self, count: int) -> list[Lease]:
        """The leases of the next `count` messages, which stay with this taker."""
        return [lease for message in self.take(count) if (lease := lease_of(message))]

    def close(self) -> None:
        self.connection.close()


class _Own:
    def __init__(self, taker: Taker, call: Callable[[Any], None]) -> None:
        self._taker, self._call = taker, call

    def __call__(self, argument: Any) -> None:
        self._call(argument)


def envelope(name: str = "", *, priority: int = 3, **headers: Any) -> dict[str, Any]:
    """A message as Celery writes it."""
    return {
        "body": json.dumps([[name], {}, None]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "note", "id": name or uuid.uuid4().hex, **headers},
        "properties": {
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": priority,
        },
    }


def list_name(priority: int) -> str:
    return QUEUE if not priority else f"{QUEUE}{PRIORITY_SEPARATOR}{priority}"


def push(client: Redis, *names: str, priority: int = 3, **headers: Any) -> None:
    """Queue messages as a stock producer does, first named first served."""
    texts = [json.dumps(envelope(name, priority=priority, **headers)) for name in names]
    client.lpush(list_name(priority), *texts)


def names(messages: list[Any]) -> list[str]:
    return [message.headers["id"] for message in messages]


EMPTY = {"high": 0, "normal": 0, "low": 0, "unacked": 0, "delayed": 0}
KEYS = ledger_keys(QUEUE)


def depth(redis: Redis) -> dict[str, int]:
    return dict(queue_depth(redis, QUEUE))


def ledger_is_empty(redis: Redis) -> bool:
    return not any(redis.exists(key) for key in KEYS.values())


def waits(redis: Redis, lists: int) -> bool:
    return sum(client["cmd"] == "blmove" for client in redis.client_list()) == lists


@dataclass(frozen=True)
class Held:
    """A message that is with a worker."""

    job_id: str | None
    seconds: float
    """How long the worker has had it."""
    renewed_seconds: float
    """How long ago its lease was renewed."""
    deliveries: int


def held_messages(redis: Redis) -> list[Held]:
    """The messages that workers hold, as Redis tells it, longest held first."""
    keys = ledger_keys(QUEUE)
    pipe: Any = redis.pipeline()
    pipe.time()
    for name in ("owners_key", "deliveries_key", "unacked_key"):
        pipe.hgetall(keys[name])
    pipe.zrange(keys["unacked_index_key"], 0, -1, withscores=True)
    (seconds, micros), owners, deliveries, messages, renewed = pipe.execute()
    now, scores = seconds + micros / 1e6, dict(renewed)
    found = []
    for tag, owner in owners.items():
        since = float(owner.rpartition(b"@")[2])
        found.append(Held(message_id(messages[tag]), now - since, now - scores[tag], int(deliveries.get(tag, 0))))
    return sorted(found, key=lambda one: -one.seconds)
