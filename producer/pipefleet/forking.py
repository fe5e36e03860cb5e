"""After `os.fork()`: the child has one thread, copies of locks that others may have held, and connections that it must not share.

Whatever keeps such state calls `renew_after_fork(self)` once, and its `after_fork` makes the state anew in each child.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """Something whose locks, threads or connections do not survive a fork."""

    def after_fork(self) -> None:
        """Make them anew. Called in the child, by its only thread, before anything else runs; must not wait for anything."""


_known: WeakSet[Forkable] = WeakSet()


def renew_after_fork(one: Forkable) -> None:
    """Have `one.after_fork()` called in every child process from now on; `one` is not kept alive by this."""
    _known.add(one)


def _after_fork() -> None:
    for one in list(_known):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
