"""Bounds on what is inside a worker: items and bytes of bulk work. Single jobs are bounded by the consumer's concurrency."""

from __future__ import annotations

import threading


class Budget:
    """Counts items and bytes that are inside. Thread-safe."""

    def __init__(self, items: int, size: int) -> None:
        self._most_items = items
        self._most_bytes = size
        self._items = 0
        self._bytes = 0
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, items: int, size: int) -> None:
        """Wait until this much more fits, or nothing else is inside; a single item above the bound passes alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._fits(items, size) or self._closed)
            self._items += items
            self._bytes += size

    def release(self, items: int, size: int) -> None:
        """Give back what was acquired."""
        with self._changed:
            self._items -= items
            self._bytes -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let everybody pass from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _fits(self, items: int, size: int) -> bool:
        fits = self._items + items <= self._most_items and self._bytes + size <= self._most_bytes
        return fits or self._items == 0
