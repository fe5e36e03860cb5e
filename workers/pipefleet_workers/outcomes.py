"""`Outcomes`: the sink of one job, where its message's thread waits for the items to end."""

from __future__ import annotations

import threading

from pipefleet_workers.items import Outcome


class Outcomes:
    """Collects the outcomes of one job's items, by position. Thread-safe."""

    def __init__(self, expected: int) -> None:
        self._expected = expected
        self._outcomes: dict[int, Outcome] = {}
        self._new: list[Outcome] = []
        self._changed = threading.Condition()
        self._abandoned = False

    def deliver(self, outcome: Outcome) -> None:
        """Take one outcome. A second one for the same item is dropped: the first is final."""
        with self._changed:
            if outcome.work.position in self._outcomes:
                return
            self._outcomes[outcome.work.position] = outcome
            self._new.append(outcome)
            if self.complete:
                self._changed.notify_all()

    def wait(self, seconds: float) -> list[Outcome]:
        """Wait until all items have ended, or `seconds`; returns the outcomes that came since the last call."""
        with self._changed:
            self._changed.wait_for(lambda: self.complete or self._abandoned, seconds)
            new, self._new = self._new, []
            return new

    def abandon(self) -> None:
        """Wake the waiting thread: the worker shuts down and the job goes back to the queue."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    @property
    def abandoned(self) -> bool:
        """True after `abandon`."""
        return self._abandoned

    @property
    def complete(self) -> bool:
        """True when every item has ended."""
        return len(self._outcomes) >= self._expected

    def in_order(self) -> list[Outcome]:
        """All outcomes by position. Only when complete."""
        return [self._outcomes[position] for position in range(self._expected)]
