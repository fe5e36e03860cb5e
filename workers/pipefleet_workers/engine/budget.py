"""Bounds the memory of a worker: items and bytes of bulk work, bytes of decoded inputs, of outputs and of results.

    inputs ─▶ decoded, and the model's features ─▶ outputs of the model ─▶ results ─▶ stored

Each of the four kinds waits only for room that later kinds give back, so no kind can wait for itself. Until an input is
decoded, it counts with the bytes that its header declares. The engine calls the budget at each step. Single jobs enter without
waiting: the consumer bounds them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from pipefleet_workers.items import Work

LOOK_SECONDS = 0.25
"""How often a thread that waits for room checks whether its job was stopped meanwhile."""
PORTIONS = 4
"""Items that come together are divided so that this many portions fit: work on the first begins while the others wait."""


class Budget:
    """Counts items and their bytes; `size` bytes are the bound for all kinds together. Thread-safe.

    A single item above the bound passes alone. A result exists before it can be counted, so each thread of the finish stage may
    hold one result beyond the bound.
    """

    def __init__(self, items: int, size: int) -> None:
        self._most_items = items
        self._most_bytes = size
        self.portion = size // PORTIONS
        self._items = self._inputs = self._decoded = self._outputs = self._results = 0
        self._entering: deque[object] = deque()
        self._decoding: deque[object] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def enter(self, works: Sequence[Work], stopped: Callable[[], object]) -> bool:
        """Wait until these items fit, or the worker is empty.

        False when `stopped` becomes true meanwhile; then they are not counted.
        """
        size = sum(work.weight for work in works)
        with self._changed:
            if not self._waited(self._entering, lambda: self._fits(len(works), size), stopped):
                return False
            self._items += len(works)
            self._inputs += size
            for work in works:
                work.room.inputs = work.weight
        return True

    def decode(self, works: Sequence[tuple[Work, int]], stopped: Callable[[], object]) -> bool:
        """Wait until the decoded bytes of these items fit, or no decoded input is held.

        False when `stopped` becomes true meanwhile.

        A caller must not hold room for decoded inputs of other items while it waits: two such callers could wait for each other.
        """
        size = sum(one for _, one in works)
        with self._changed:
            if not self._waited(self._decoding, lambda: self._fits_decoded(size), stopped):
                return False
            self._reweigh(works)
        return True

    def prepared(self, works: Sequence[tuple[Work, int]]) -> None:
        """Each item has become features of the given number of bytes; its decoded form is freed."""
        with self._changed:
            self._reweigh(works)
            self._changed.notify_all()

    def hold(self, outputs: Sequence[tuple[Work, int]]) -> None:
        """Count the model's outputs of items, in bytes; wait until they fit."""
        size = sum(one for _, one in outputs)
        with self._changed:
            self._changed.wait_for(lambda: self._fits_behind(self._outputs + self._results, size))
            for work, one in outputs:
                work.room.outputs += one
            self._outputs += size
            self._reweigh([(work, 0) for work, _ in outputs])
            self._changed.notify_all()

    @property
    def stores(self) -> bool:
        """True while a result is counted, so that `finish` may wait."""
        return self._results > 0

    def finish(self, work: Work) -> None:
        """Wait until there is room for a result of the size of the item's output."""
        size = work.room.outputs
        with self._changed:
            self._changed.wait_for(lambda: self._fits_behind(self._results, size))

    def weigh(self, work: Work, size: int) -> None:
        """The item's output has become a result of `size` bytes."""
        with self._changed:
            self._outputs -= work.room.outputs
            self._results += size - work.room.result
            work.room.outputs, work.room.result = 0, size
            self._changed.notify_all()

    def leave(self, *works: Work) -> None:
        """Give back all the room of items. May be called several times."""
        with self._changed:
            for room in [work.room for work in works]:
                if room.inputs is not None:
                    self._items -= 1
                    self._inputs -= room.inputs
                self._decoded -= room.decoded
                self._outputs -= room.outputs
                self._results -= room.result
                room.inputs, room.decoded, room.outputs, room.result = None, 0, 0, 0
            self._changed.notify_all()

    def open(self) -> None:
        """Let threads wait for room again, as at first."""
        with self._changed:
            self._closed = False

    def close(self) -> None:
        """Let every thread pass from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def empty(self) -> bool:
        """True when nothing is counted."""
        with self._changed:
            return not (self._items or self._inputs or self._decoded or self._outputs or self._results)

    def _fits(self, items: int, size: int) -> bool:
        taken = self._inputs + self._decoded + self._outputs + self._results
        fits = self._items + items <= self._most_items and taken + size <= self._most_bytes
        return fits or self._items == 0 or self._closed

    def _waited(self, line: deque[object], fits: Callable[[], bool], stopped: Callable[[], object]) -> bool:
        """Wait in line, with the lock held, until `fits`.

        If small items could pass a large one, the large one would wait for ever.
        """
        turn = object()
        line.append(turn)
        try:
            while line[0] is not turn or not fits():
                if stopped():
                    return False
                self._changed.wait(LOOK_SECONDS)
            return True
        finally:
            line.remove(turn)
            self._changed.notify_all()

    def _reweigh(self, works: Sequence[tuple[Work, int]]) -> None:
        for work, size in works:
            self._decoded += size - work.room.decoded
            work.room.decoded = size

    def _fits_decoded(self, size: int) -> bool:
        return self._fits_behind(self._decoded + self._outputs + self._results, size)

    def _fits_behind(self, taken: int, size: int) -> bool:
        return taken == 0 or taken + size <= self._most_bytes or self._closed
