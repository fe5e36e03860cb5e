"""`Bells`: which lists of a channel are worth a fetch, and a wait on each of the others.

    a fetch leaves a list empty ─▶ wait on the list ─▶ a message rings the bell ─▶ fetch at once, or let it wake another worker

The channel of `transport` calls it, in the thread that runs Celery's event loop. `waiting` has the commands of one wait. Errors
of the connection pass to the caller, who connects again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any

from redis.exceptions import ResponseError

from pipefleet_workers.delivery.fetch import Fetch, Source
from pipefleet_workers.delivery.leases import Lease
from pipefleet_workers.delivery.scripts import GATHER
from pipefleet_workers.delivery.server_errors import FULL, is_no_list, retried, word_of
from pipefleet_workers.delivery.waiting import Bell

if TYPE_CHECKING:
    from pipefleet_workers.delivery.transport import Channel

FULL_SECONDS = 1.0
"""How often a worker looks for messages while the server is full."""


class Bells:
    """The waits of one channel. Not thread-safe."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.by_list: dict[str, Bell] = {}
        self._known_empty: set[str] = set()
        self._arrived: set[str] = set()
        """Lists in which a message woke this channel after its last fetch was sent."""
        self._look_at: float | None = None
        """When to look again at lists that no worker may wait on, because the server is full."""

    def worth_a_fetch(self, lists: Sequence[Source]) -> bool:
        """Whether one of the lists may hold a message."""
        if self._look_at is not None and monotonic() >= self._look_at:
            self._look_at = None
            self._known_empty.clear()
        return not self._known_empty.issuperset(one.name for one in lists)

    def wait_for(self, lists: Sequence[Source]) -> None:
        """Wait on empty lists, unless the server lets no worker wait; then the channel looks again later."""
        if self._look_at is not None:
            return
        channel = self._channel
        for one in lists:
            bell = self.by_list.get(one.name) or self._new_bell(one.name)
            if not bell.armed:
                channel.connection.cycle.register_bell(channel, bell)
                # A worker with bulk inside leaves the message to an idle worker, if one is as quick.
                bell.arm(channel.wait_seconds, takes=not channel.ledger.held_low)

    def fetch_sent(self, fetch: Fetch) -> None:
        """A fetch is on its way, and takes the messages that woke this channel."""
        self._arrived.difference_update(one.name for one in fetch.lists)

    def fetch_failed(self, fetch: Fetch) -> None:
        """The messages of a fetch still wait to be fetched."""
        self._arrived.update(one.name for one in fetch.lists)

    def fetched(self, fetch: Fetch, leases: Sequence[Lease], *, more: bool) -> None:
        """Note the lists as empty after a fetch with room left; no second fetch is needed. `more`: messages are left there."""
        self._known_empty.clear()
        if len(leases) >= fetch.credit or more:
            return
        low_seen = sum(lease.low for lease in leases) < fetch.low_credit
        self._known_empty.update(one.name for one in fetch.lists if low_seen or not one.low)
        self._known_empty -= self._arrived

    def forget(self) -> None:
        """Nothing is known of the lists: the connection of the fetches is gone."""
        self._known_empty.clear()

    def pass_on(self, names: Iterable[str] | None = None) -> None:
        """Let messages that woke this channel wake other workers if it has no room for them now. Without `names`: of all lists."""
        channel = self._channel
        for name in self._arrived.intersection(self._arrived if names is None else names):
            bell = self.by_list.get(name)
            if bell is not None and bell.idle and not channel.has_room(name):
                self._arrived.discard(name)
                # Send the text: no code reads the answer of a bell, so none would send the text after a NOSCRIPT.
                bell.put_back(["EVAL", GATHER, len(channel.ledger.keys), *channel.ledger.keys, name])

    def drop_overdue(self, seconds: float) -> None:
        """Drop waiting connections whose answer is at least `seconds` late."""
        for bell in self.by_list.values():
            if bell.overdue(seconds):
                bell.connection.disconnect()

    def disconnected(self, connection: Any) -> None:
        """A socket is gone."""
        for bell in self.by_list.values():
            if bell.connection is connection:
                bell.disconnected()
                self._known_empty.discard(bell.name)  # its last command may have moved a message without an answer

    def hang_up(self) -> None:
        """Stop waiting on lists; messages that woke this channel meanwhile go back at once."""
        waited = any(bell.armed for bell in self.by_list.values()) or self._arrived
        for bell in self.by_list.values():
            bell.connection.disconnect()
        self.by_list.clear()
        self._arrived.clear()
        if waited:
            self._channel.ledger.gather_soon()

    def _new_bell(self, name: str) -> Bell:
        pool = self._channel.async_pool
        bell = Bell(pool.connection_class(**pool.connection_kwargs), name, self._rung)
        self.by_list[name] = bell
        self._channel.handlers[bell.kind] = lambda: self._read(bell)
        return bell

    def _read(self, bell: Bell) -> None:
        try:
            bell.read()
        except ResponseError as error:
            if word_of(error) != FULL and not is_no_list(error):
                raise retried(error) from error
            self._look_again_soon()
            raise Empty from None

    def _look_again_soon(self) -> None:
        """Look at the lists again in FULL_SECONDS: no worker may wait on a list of a full server, or on a key that is no list."""
        self._look_at = monotonic() + FULL_SECONDS
        loop = self._channel.loop
        if loop is not None:
            loop.call_later(FULL_SECONDS, lambda: None)

    def _rung(self, bell: Bell) -> None:
        channel = self._channel
        self._known_empty.discard(bell.name)
        if bell.takes:
            self._arrived.add(bell.name)
        if not channel.fetching and channel.has_room(bell.name):
            channel.connection.cycle.fetch_now(channel)
        if not channel.fetching:
            self.pass_on([bell.name])
