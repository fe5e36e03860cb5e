"""Objects that make their state anew after `os.fork()`.

A child process has one thread, copies of locks that other threads may have held, and connections that it must not share. An
object with such state calls `renew_after_fork(self)` once. Python then calls its `after_fork` in each child.
"""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """An object whose locks, threads or connections do not survive a fork."""

    def after_fork(self) -> None:
        """Make locks, threads and connections anew.

        Python calls this in the child, on its only thread, before other code runs. It must not wait.
        """


_known: WeakSet[Forkable] = WeakSet()


def renew_after_fork(one: Forkable) -> None:
    """Call `one.after_fork()` in every child process from now on. Only a weak reference to `one` is kept."""
    _known.add(one)


def _after_fork() -> None:
    for one in list(_known):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
