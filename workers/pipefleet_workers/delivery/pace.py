"""`Pace`: a busy channel fetches a little later, so that messages come in larger batches.

    at least BUSY single jobs are here ─▶ the next fetch goes PACE_SECONDS after the last one, without a wait on the lists

A fetch, the start of its jobs, their forward and their report cost a worker nearly the same for one job and for ten. The channel of
`transport` asks in the thread of Celery's event loop. A worker with few jobs fetches at once, so a job alone waits for nothing.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipefleet_workers.delivery.transport import Channel

BUSY = 8
"""With so many single jobs a channel is busy."""
PACE_SECONDS = 0.003
"""Least seconds between two fetches of a busy channel."""


class Pace:
    """The fetches of one channel in time. Not thread-safe."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._fetched_at = 0.0
        self._wakes = False
        """Whether the event loop will wake for the next fetch."""

    @property
    def busy(self) -> bool:
        """Whether so many single jobs are here that further ones may come together."""
        ledger = self._channel.ledger
        return self._channel.loop is not None and ledger.held - ledger.held_low >= BUSY

    def fetched(self) -> None:
        """A fetch was sent."""
        self._fetched_at = monotonic()

    def is_early(self) -> bool:
        """Whether the next fetch has to wait; then the event loop wakes for it."""
        if not self.busy:
            return False
        left = self._fetched_at + PACE_SECONDS - monotonic()
        if left > 0 and not self._wakes:
            self._wakes = True
            self._channel.loop.call_later(left, self._wake)
        return left > 0

    def _wake(self) -> None:
        """The event loop is awake, and looks for messages at its next turn."""
        self._wakes = False
