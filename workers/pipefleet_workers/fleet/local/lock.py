"""Allows one stack for each data directory: a kernel lock, which ends with its processes, on a file that names the holder.

`Stack` acquires it before anything starts, and its children inherit it. A directory in use raises StackError with the holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from pipefleet_workers.fleet.local.errors import StackError

_ORPHAN_SECONDS = 5.0
_DYING_SECONDS = 0.5


class DataLock:
    """Lock on `path`. The children of a stack inherit it, so it is free only after the last of them has ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int:
        """The open file that children inherit. Raises StackError when the lock is not held."""
        if self._descriptor is None:
            raise StackError("the data directory is not locked; start the stack first")
        return self._descriptor

    def acquire(self) -> None:
        """Take the lock. Raises StackError that names the process that holds it.

        Waits 0.5 s for a living holder, and up to 5 s until the children of an ended holder have ended too.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        begin = time.monotonic()
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            # A holder that was killed a moment ago may still look alive.
            if time.monotonic() - begin > (_DYING_SECONDS if _is_alive(holder) else _ORPHAN_SECONDS):
                raise StackError(self._refusal(holder))
            time.sleep(0.05)

    def _refusal(self, holder: str) -> str:
        folder = self._path.parent
        if _is_alive(holder):
            return f"{folder} is in use by process {holder}; stop it or choose another data directory"
        return f"{folder} is in use by children of process {holder or '?'}, which ended; end them and retry"


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: str) -> bool:
    """Whether the process has ended and only waits to be reaped; False if /proc cannot be read."""
    try:
        stat = Path("/proc", pid, "stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]
