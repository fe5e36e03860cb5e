"""Waiting on every priority's list at once, without taking anything.

`BLMOVE list list RIGHT RIGHT` moves the next message onto its own place: it returns as soon as one is there, whoever
pushed it, and changes nothing, so a worker that dies while it waits loses nothing. One command watches one list, hence a
socket for each of them. The messages themselves come with the fetch that follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty
from typing import Any

from kombu.transport.redis import MultiChannelPoller

BELL = "BELL"


class Bell:
    """One list that is waited on. Stands in kombu's poller like a client: it has a `connection`."""

    def __init__(self, connection: Any, name: str, rung: Callable[[str], None]) -> None:
        self.connection = connection
        self.name = name
        self.kind = f"{BELL}:{name}"
        self._rung = rung
        self._asked_at: float | None = None

    @property
    def armed(self) -> bool:
        """Whether an answer is outstanding."""
        return self._asked_at is not None

    def arm(self, seconds: float) -> None:
        """Ask to be told of a message, within `seconds`; the connection is made and registered before."""
        self.connection.send_command("BLMOVE", self.name, self.name, "RIGHT", "RIGHT", seconds)
        self._asked_at = time.monotonic()

    def read(self) -> None:
        """Take the answer: call `rung` if there is a message. Always raises Empty, kombu's word for no delivery."""
        try:
            answer = self.connection.read_response()
        finally:
            self._asked_at = None
        if answer is not None:
            self._rung(self.name)
        raise Empty

    def disconnected(self) -> None:
        """The socket is gone, and what was asked with it."""
        self._asked_at = None

    def overdue(self, seconds: float) -> bool:
        """Whether the answer should have come `seconds` ago."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > seconds


class LeasePoller(MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, which reads bells even when a channel may take no more messages."""

    def on_readable(self, fileno: int) -> Any:
        """Handle what came on a socket."""
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        if channel is not None and kind.startswith(BELL):
            return channel.handlers[kind]()
        return super().on_readable(fileno)

    def handle_event(self, fileno: int, event: int) -> Any:
        """Handle a socket without an event loop; reading shows an error as well."""
        _, kind = self._fd_to_chan.get(fileno, (None, ""))
        if kind.startswith(BELL):
            return self.on_readable(fileno), self
        return super().handle_event(fileno, event)

    def maybe_check_brpop_health(self) -> None:
        """Drop connections whose answer is overdue, those of bells included."""
        super().maybe_check_brpop_health()
        for channel in list(self._channels):
            channel.check_bells()

    def register_bell(self, channel: Any, bell: Bell) -> None:
        """Have the bell's socket polled, connecting it first where needed."""
        if bell.connection._sock is None or (channel, bell, bell.kind) not in self._chan_to_sock:
            self._register(channel, bell, bell.kind)
