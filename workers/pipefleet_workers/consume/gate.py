"""`Gate`: most jobs run beside each other; one that may have killed a worker runs alone, so that nobody else is blamed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Counts the jobs inside. Thread-safe. Who waits to be alone keeps later ones out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    def enter(self) -> None:
        """Go in; waits while somebody is, or waits to be, alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._inside += 1

    def leave(self) -> None:
        """Come out."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else is inside, and keep everybody out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = True
            self._changed.wait_for(lambda: self._inside == 0)
        try:
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
