"""`Outcomes`: the sink of one shard; `Shards.process` makes it.

The engine's threads deliver an outcome for each item. The shard's thread waits for all outcomes, and writes progress meanwhile. If
the shard is given back, the waiting thread raises the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipefleet_workers.items import Outcome


class Outcomes:
    """Collects the outcomes of the items at `positions` of one job. Thread-safe."""

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions = positions
        self._outcomes: dict[int, Outcome] = {}
        self._new: list[Outcome] = []
        self._changed = threading.Condition()
        self._reason: Exception | None = None

    def deliver(self, *outcomes: Outcome) -> None:
        """Take outcomes. A second outcome for the same item is dropped, and so is every outcome after `abandon`."""
        with self._changed:
            if self._reason is not None:
                return
            for outcome in outcomes:
                if self._outcomes.setdefault(outcome.work.position, outcome) is outcome:
                    self._new.append(outcome)
            if self.complete:
                self._changed.notify_all()

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait until all items have ended, or `seconds`; returns the outcomes that came since the last call."""
        with self._changed:
            self._changed.wait_for(lambda: self.complete or self._reason is not None, seconds)
            new, self._new = self._new, []
            return new

    def abandon(self, reason: Exception) -> None:
        """Take no more outcomes and wake the waiting thread, which raises `reason`. Does nothing when complete."""
        with self._changed:
            if not self.complete and self._reason is None:
                self._reason = reason
                self._changed.notify_all()

    @property
    def abandoned(self) -> Exception | None:
        """Why the job goes back to its queue; None while it does not."""
        return self._reason

    @property
    def complete(self) -> bool:
        """True when every item has ended."""
        return len(self._outcomes) >= len(self._positions)

    def in_order(self) -> list[Outcome]:
        """All outcomes by position. Only when complete."""
        return [self._outcomes[position] for position in self._positions]
