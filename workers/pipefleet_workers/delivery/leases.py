"""What a worker holds of a queue: leases, the keys they stand under, and the terms they are held on. No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

from pipefleet.queues.dead_letters import DeadLetter


@dataclass(frozen=True, slots=True)
class LeaseKeys:
    """The keys of one queue's deliveries, in the order of the scripts' KEYS."""

    unacked: str
    index: str
    deliveries: str
    retries: str
    owners: str
    delayed: str
    dead: str
    unreported: str

    def all(self) -> tuple[str, ...]:
        """Every key, in order."""
        return astuple(self)


@dataclass(frozen=True, slots=True)
class Terms:
    """How leases are held. Every worker of a queue has the same `lease_seconds`."""

    lease_seconds: float
    """How long after its last renewal a message is left alone."""
    renew_seconds: float
    sweep_seconds: float
    ack_seconds: float
    """How long acks may wait for each other while the worker is busy."""
    prefix: str
    """What stands before every key and list."""
    separator: str
    steps: tuple[int, ...]
    """Priority steps, lowest number first."""
    on_dead: Callable[[DeadLetter], None] | None = None
    on_lost: Callable[[Lease], None] | None = None


@dataclass(frozen=True, slots=True)
class Acked:
    """The message is done."""


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The message goes to the head of its list, or of another, after `delay` seconds."""

    delay: float = 0.0
    list: str | None = None
    """The other list, without the global prefix."""
    retry: bool = True
    """Whether a delay counts as a retry."""


@dataclass(frozen=True, slots=True)
class Buried:
    """The message goes to the dead letters."""

    reason: str


Settlement = Acked | GivenBack | Buried


class Holder(Protocol):
    """Where a lease is kept and settled."""

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """End the lease; only the first call counts. Thread-safe."""

    def due_now(self, lease: Lease) -> None:
        """Let its message, which was put off, come back now. Thread-safe."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Lease:
    """One delivered message, held until it is settled. Thread-safe.

    Of `ack`, `give_back`, `hand_over` and `dead_letter` the first counts.

    It is renewed while somebody holds it, or the message that `lease_of` found it on; once nobody does, it runs out and the
    message is delivered again.
    """

    tag: bytes
    owner: str
    queue: str
    list: str
    """The Redis list it was taken from, with the global prefix."""
    deliveries: int
    """How often it has been delivered, this time included; give-backs are taken off."""
    retries: int
    """How often it was given back with a delay."""
    order: int
    """Rises with every message that this process fetched."""
    holder: Holder
    low: bool = False
    lost: bool = False
    """True once another worker may have the message, or Redis no longer knows it: settling it does nothing any more."""
    settled: bool = False
    key: str = field(init=False)
    """The delivery tag that this process gives the message: apart for each delivery, as Redis's own tags are not."""

    def __post_init__(self) -> None:
        self.key = f"{self.order}.{self.tag.decode(errors='replace')}"

    def ack(self) -> None:
        """The message is done: drop it within milliseconds, again and again until Redis has heard it."""
        self.holder.settle(self, Acked())

    def give_back(self, delay: float = 0.0) -> None:
        """Hand the message to whichever worker comes next, at the head of its list; does not count as a delivery.

        With a `delay` in seconds it is kept aside that long, and `retries` rises by one.
        """
        self.holder.settle(self, GivenBack(max(0.0, delay)))

    def put_off(self, seconds: float) -> None:
        """Keep the message aside for so many seconds, since its time has not come; counts as neither delivery nor retry."""
        self.holder.settle(self, GivenBack(max(0.0, seconds), retry=False))

    def due_now(self) -> None:
        """Let a message that was put off come back at once. Returns at once; nothing where it has come back already."""
        self.holder.due_now(self)

    @property
    def taken_at(self) -> float:
        """When it was fetched, in seconds since 1970 by the server's clock."""
        return float(self.owner.rpartition("@")[2])

    def hand_over(self, queue: str, list: str) -> None:
        """Move the message to the head of another queue's list; does not count as a delivery.

        Where that is the queue that it came from, it is kept aside for a second, so that another worker takes it.
        """
        self.holder.settle(self, GivenBack(1.0) if queue == self.queue else GivenBack(list=list))

    def dead_letter(self, reason: str) -> None:
        """Move the message to the dead letters with one sentence why."""
        self.holder.settle(self, Buried(reason))


def lease_of(message: Any) -> Lease | None:
    """The lease of a kombu message that came from the lease transport, or None for any other."""
    found = getattr(message, "lease", None)
    return found if isinstance(found, Lease) else None


def is_queue_name(name: object) -> bool:
    """Whether the book-keeping can carry the name of a queue: a text without quotes, backslashes and control characters."""
    return isinstance(name, str) and bool(name) and json.dumps(name, ensure_ascii=False) == f'"{name}"'
