"""Waiting on every priority's list at once, so that a message wakes one idle worker and is never with a worker that dies.

`BLMOVE list list:arriving RIGHT LEFT` returns as soon as a message is there, whoever pushed it, to the worker that has waited
longest, and to this one alone. The message is still the queue's: whoever fetches next, most often the worker that was woken,
first puts what lies in `arriving` back to the head of its list (see `scripts.gather`). So does every sweep, for a worker that
died or froze, and a worker that has no room by the time it is woken, which wakes the next one.

A worker with bulk inside does not take: `BLMOVE list list RIGHT RIGHT` wakes it as well, changes nothing, and leaves the message
to whoever is faster. One command watches one list, hence a socket for each of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any

from kombu.transport.redis import MultiChannelPoller

from pipefleet.queues.keys import ARRIVING

BELL = "BELL"


class Bell:
    """One list that is waited on. Stands in kombu's poller like a client: it has a `connection`."""

    def __init__(self, connection: Any, name: str, rung: Callable[[Bell], None]) -> None:
        self.connection = connection
        self.name = name
        self.kind = f"{BELL}:{name}"
        self.takes = False
        """Whether the message that rings goes to the list of those that arrive."""
        self._rung = rung
        self._asked_at: float | None = None
        self._puts_back = False

    @property
    def armed(self) -> bool:
        """Whether an answer is outstanding."""
        return self._asked_at is not None

    @property
    def idle(self) -> bool:
        """Whether it is connected, and nothing was asked."""
        return self._asked_at is None and self.connection._sock is not None

    def arm(self, seconds: float, *, takes: bool) -> None:
        """Ask to be told of a message, within `seconds`; the connection is made and registered before."""
        where = (self.name + ARRIVING, "RIGHT", "LEFT") if takes else (self.name, "RIGHT", "RIGHT")
        self.connection.send_command("BLMOVE", self.name, *where, seconds)
        self.takes, self._puts_back, self._asked_at = takes, False, time.monotonic()

    def put_back(self, command: Sequence[Any]) -> None:
        """Send what lets the message that rang wake others. Returns at once; `read` takes the answer."""
        self.connection.send_command(*command)
        self._puts_back, self._asked_at = True, time.monotonic()

    def read(self) -> None:
        """Take the answer: call `rung` if there is a message. Always raises Empty, kombu's word for no delivery."""
        try:
            answer = self.connection.read_response()
        finally:
            self._asked_at = None
        if answer is not None and not self._puts_back:
            self._rung(self)
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
