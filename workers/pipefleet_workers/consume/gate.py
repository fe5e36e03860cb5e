"""`Gate`: most jobs run beside each other; a job that may have killed a worker runs alone, so that no other job is blamed.

The consumer's threads enter and leave. Jobs of one batch must enter with one call, see `Gate`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Counts the jobs inside. Thread-safe. A job that waits to be alone keeps later jobs out.

    Jobs that begin together enter with one call. A thread that entered for one job and then waited to enter for the next could wait
    for ever: the first job ends only after the thread has begun it, and a job that waits to be alone waits for this end.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False

    def enter(self, count: int = 1) -> None:
        """Let `count` jobs in, all at once. Waits while a job is alone, or waits to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._inside += count

    def leave(self, count: int = 1) -> None:
        """`count` jobs leave. Raises ValueError, and changes nothing, when fewer are inside."""
        with self._changed:
            if count > self._inside:
                raise ValueError(f"{count} jobs cannot leave a gate with {self._inside} inside")
            self._inside -= count
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no job is inside, then keep every other job out."""
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
