"""`Gate`: most jobs run beside each other; one that may have killed a worker runs alone, so that nobody else is blamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Counts the jobs inside. Thread-safe. Who waits to be alone keeps later ones out.

    Jobs that begin together enter together: a thread that entered for one of them and then waited to enter for the next would
    wait for ever, since the job inside cannot end before it begins, and who waits to be alone waits for its end.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    def enter(self, count: int = 1) -> None:
        """Let `count` jobs in, all at once; waits while somebody is, or waits to be, alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._inside += count

    def leave(self, count: int = 1) -> None:
        """`count` jobs come out. Raises ValueError, and changes nothing, when fewer are inside."""
        with self._changed:
            if count > self._inside:
                raise ValueError(f"{count} jobs cannot leave a gate with {self._inside} inside")
            self._inside -= count
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else is inside, and keep everybody out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._inside == 0)
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    @property
    def empty(self) -> bool:
        """True when no job is inside, alone or not."""
        with self._changed:
            return self._inside == 0 and not self._alone
