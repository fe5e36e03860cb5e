"""The types of delivery: leases, the Redis keys that hold them, and the terms of a lease. No I/O.

fetched ─▶ held, renewed ─┬─ ack ─────────▶ Acked       gone
                          ├─ give_back ───▶ GivenBack   to its list, at once or after a delay
                          ├─ dead_letter ─▶ Buried      to the dead letters
                          └─ not renewed ─▶ lost        another worker may have the message
"""

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
    """The terms of a lease. Every worker of a queue has the same `lease_seconds`."""

    lease_seconds: float
    """A message is left alone for this long after its last renewal."""
    renew_seconds: float
    sweep_seconds: float
    ack_seconds: float
    """How long acks may wait for each other while the worker is busy."""
    prefix: str
    """The prefix of every key and list."""
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
    """The message goes to the head of its list, or of another list, after `delay` seconds."""

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
    """Keeps a lease, and writes its end."""

    def settle(self, lease: Lease, settlement: Settlement) -> None:
        """End the lease; only the first call counts. Thread-safe."""

    def due_now(self, lease: Lease) -> None:
        """End the delay of a lease that was put off. Thread-safe."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Lease:
    """One delivered message, held until it is settled. Thread-safe.

    Of `ack`, `give_back`, `hand_over` and `dead_letter` only the first call counts.

    It is renewed as long as a Python reference exists to the lease, or to its kombu message (see `lease_of`). Without a reference
    it runs out, and the message is delivered again.
    """

    tag: bytes
    owner: str
    queue: str
    list: str
    """The Redis list that the message came from, with the global prefix."""
    deliveries: int
    """How often the message was delivered, this time included; deliveries that were given back do not count."""
    retries: int
    """How often the message was given back with a delay."""
    order: int
    """Rises with every message that this process fetches."""
    holder: Holder
    low: bool = False
    lost: bool = False
    """True once another worker may have the message, or Redis no longer knows it; settling then does nothing."""
    settled: bool = False
    key: str = field(init=False)
    """The delivery tag of the message in this process. It differs for each delivery; Redis's own tags do not."""

    def __post_init__(self) -> None:
        self.key = f"{self.order}.{self.tag.decode(errors='replace')}"

    def ack(self) -> None:
        """The message is done: delete it within milliseconds, and repeat until Redis has answered."""
        self.holder.settle(self, Acked())

    def give_back(self, delay: float = 0.0) -> None:
        """Give the message to the next worker, at the head of its list; this delivery does not count.

        With a `delay` in seconds the message is kept aside so long, and `retries` rises by one.
        """
        self.holder.settle(self, GivenBack(max(0.0, delay)))

    def put_off(self, seconds: float) -> None:
        """Keep the message aside for `seconds`. This counts neither as a delivery nor as a retry."""
        self.holder.settle(self, GivenBack(max(0.0, seconds), retry=False))

    def due_now(self) -> None:
        """Put a message that was put off back to its list now. Returns at once; does nothing if it is back already."""
        self.holder.due_now(self)

    @property
    def taken_at(self) -> float:
        """When the message was fetched, in seconds since 1970 on the server's clock."""
        return float(self.owner.rpartition("@")[2])

    def hand_over(self, queue: str, list: str) -> None:
        """Move the message to the head of another queue's list; this delivery does not count.

        If it came from that queue, the message is kept aside for a second, so that another worker takes it.
        """
        self.holder.settle(self, GivenBack(1.0) if queue == self.queue else GivenBack(list=list))

    def dead_letter(self, reason: str) -> None:
        """Move the message to the dead letters, with a reason of one sentence."""
        self.holder.settle(self, Buried(reason))


def lease_of(message: Any) -> Lease | None:
    """The lease of a kombu message from the lease transport; None for any other message."""
    found = getattr(message, "lease", None)
    return found if isinstance(found, Lease) else None


def is_queue_name(name: object) -> bool:
    """Whether the Redis records can hold this name of a queue: a text without quotes, backslashes and control characters."""
    return isinstance(name, str) and bool(name) and json.dumps(name, ensure_ascii=False) == f'"{name}"'
