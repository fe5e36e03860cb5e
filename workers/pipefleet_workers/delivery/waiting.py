"""Waits on the lists of all priorities at once: a message wakes one idle worker, and a worker that dies does not lose it.

    list ──BLMOVE──▶ list:arriving ──gather, at the next fetch or sweep──▶ head of list ──fetch──▶ lease

`BLMOVE list list:arriving RIGHT LEFT` returns as soon as any program pushes a message. Redis wakes only the worker that has waited
longest. The message still belongs to the queue: the next fetch, usually by the woken worker, first puts the messages of `arriving`
back to the head of their list (`gather` in `scripts`). Every sweep does the same, for a worker that died or froze. A woken worker
without room does the same too, and so wakes the next worker.

A worker with bulk inside does not move the message: `BLMOVE list list RIGHT RIGHT` wakes it as well, changes nothing, and leaves
the message to the faster worker. One command watches one list, so each list needs a socket.
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
    """A wait on one list. In kombu's poller it takes the place of a client, so it has a `connection`."""

    def __init__(self, connection: Any, name: str, rung: Callable[[Bell], None]) -> None:
        self.connection = connection
        self.name = name
        self.kind = f"{BELL}:{name}"
        self.takes = False
        """Whether the message moves to the list `arriving` when it rings."""
        self._rung = rung
        self._asked_at: float | None = None
        self._puts_back = False

    @property
    def armed(self) -> bool:
        """Whether an answer is outstanding."""
        return self._asked_at is not None

    @property
    def idle(self) -> bool:
        """Whether it is connected and no command is outstanding."""
        return self._asked_at is None and self.connection._sock is not None

    def arm(self, seconds: float, *, takes: bool) -> None:
        """Ask to be woken by a message within `seconds`; the caller has made and registered the connection."""
        where = (self.name + ARRIVING, "RIGHT", "LEFT") if takes else (self.name, "RIGHT", "RIGHT")
        self.connection.send_command("BLMOVE", self.name, *where, seconds)
        self.takes, self._puts_back, self._asked_at = takes, False, time.monotonic()

    def put_back(self, command: Sequence[Any]) -> None:
        """Send `command`, which lets the message wake other workers. Returns at once; `read` takes the answer."""
        self.connection.send_command(*command)
        self._puts_back, self._asked_at = True, time.monotonic()

    def read(self) -> None:
        """Take the answer; call `rung` if it is a message. Always raises Empty, kombu's word for "no delivery"."""
        try:
            answer = self.connection.read_response()
        finally:
            self._asked_at = None
        if answer is not None and not self._puts_back:
            self._rung(self)
        raise Empty

    def disconnected(self) -> None:
        """The socket is gone, and with it the outstanding command."""
        self._asked_at = None

    def overdue(self, seconds: float) -> bool:
        """Whether the answer is at least `seconds` late, counted from the command."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > seconds


class LeasePoller(MultiChannelPoller):  # type: ignore[misc]
    """kombu's poller, which also reads bells while a channel may take no more messages."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: Any = None
        """The event loop of a Celery worker, once there is one."""
        self._watched: dict[int, Any] = {}
        """By number, the sockets that the event loop watches; a new socket may have the number of a closed one."""

    @property
    def fds(self) -> dict[int, Any]:
        """The sockets to watch. For an event loop only those that it does not watch yet: kombu registers them at every turn."""
        found: dict[int, Any] = super().fds
        if self.loop is None:
            return found
        sockets = {one.fileno(): one for one in self._chan_to_sock.values()}
        seen, readers = self._watched, self.loop.readers
        fresh = {fd: one for fd, one in found.items() if fd not in readers or seen.get(fd) is not sockets.get(fd)}
        seen.update((fd, sockets.get(fd)) for fd in fresh)
        return fresh

    def fetch_now(self, channel: Any) -> None:
        """Let a channel with room ask for messages at once, and not only at the loop's next turn."""
        if channel.active_queues and channel.qos.can_consume():
            self._register_BRPOP(channel)

    def on_readable(self, fileno: int) -> Any:
        """Handle the data of a socket."""
        channel, kind = self._fd_to_chan.get(fileno, (None, ""))
        if channel is not None and kind.startswith(BELL):
            return channel.handlers[kind]()
        return super().on_readable(fileno)

    def handle_event(self, fileno: int, event: int) -> Any:
        """Handle a socket without an event loop; reading shows errors as well."""
        _, kind = self._fd_to_chan.get(fileno, (None, ""))
        if kind.startswith(BELL):
            return self.on_readable(fileno), self
        return super().handle_event(fileno, event)

    def maybe_check_brpop_health(self) -> None:
        """Drop connections whose answer is overdue, bells included."""
        super().maybe_check_brpop_health()
        for channel in list(self._channels):
            channel.check_bells()

    def register_bell(self, channel: Any, bell: Bell) -> None:
        """Let the poller watch the bell's socket; connects it first if needed."""
        if bell.connection._sock is None or (channel, bell, bell.kind) not in self._chan_to_sock:
            self._register(channel, bell, bell.kind)
