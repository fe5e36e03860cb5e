"""The prefetch of a channel, counted by the leases of its ledger instead of kombu's list of tags.

Kombu makes a `QoS` for each channel.
"""

from __future__ import annotations

import logging
from typing import Any

from kombu.transport import redis as stock

log = logging.getLogger(__name__)
UNBOUNDED = 1 << 30
"""More messages than any worker takes."""


class QoS(stock.QoS):  # type: ignore[misc]
    """The messages of a channel: the leases of its ledger, which outlive the channel when a connection breaks."""

    def can_consume(self) -> bool:
        """Whether there is room for a message."""
        return self.credit() > 0

    def can_consume_max_estimate(self) -> int:
        """How many messages there is room for."""
        return self.credit()

    def credit(self) -> int:
        """How many messages may be taken now. Sets the channel's `starved` flag before it counts.

        The flag comes first: a lease that ends between the count and the flag would otherwise wake no one.
        """
        if not self.prefetch_count:
            return UNBOUNDED
        self.channel.starved = True
        room: int = max(0, self.prefetch_count - self.channel.ledger.held - len(self._delivered) + len(self._dirty))
        self.channel.starved = room == 0 or self.channel.low_starved
        return room

    def ack(self, delivery_tag: str) -> None:
        """The message is done. Thread-safe."""
        lease = self.channel.ledger.find(delivery_tag)
        if lease is not None:
            lease.ack()
        elif delivery_tag in self._delivered:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Give the message back at once; with `requeue` false move it to the dead letters. Thread-safe."""
        lease = self.channel.ledger.find(delivery_tag)
        if lease is None:
            if delivery_tag in self._delivered:
                super().reject(delivery_tag, requeue=requeue)
        elif requeue:
            lease.give_back()
        else:
            lease.dead_letter("it was rejected by its consumer")

    def restore_visible(self, start: int = 0, num: int = 10, interval: int = 10) -> None:
        """Do nothing: the ledger sweeps, by the server's clock and also while the event loop is busy."""

    def restore_unacked(self, client: Any = None) -> None:
        """Give back all messages that this process holds, and wait until Redis has them."""
        ledger = self.channel.ledger
        self.channel.finish_callbacks()
        ledger.give_all_back()
        if not ledger.flush(5.0):
            log.warning("messages could not be given back; they are delivered again once their lease runs out")

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """At the end of a channel: give back the held messages. Does nothing if only a connection broke, since the tasks go on."""
        self._on_collect.cancel()
        self._flush()
        if self.channel.do_restore and self.channel.leasing:
            self.restore_unacked()
        if self._delivered:
            super().restore_unacked()
