"""Run as a script: tie this process to its parent, then become the command: `tether.py PARENT COMMAND…`.

The local stack starts its children this way; a preprocessing process calls `tie` itself. The script is a step of its own, because
the same between fork and exec (`preexec_fn`) can deadlock a parent with threads. On Linux the kernel kills the command when the
parent's thread that forked it ends; on other systems the command just runs. A command that cannot run raises OSError.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def become(parent: int, command: list[str]) -> None:
    """Replace this process by `command`, which ends with `parent`. Returns only by raising OSError."""
    os.umask(0o077)
    tie(parent)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores SIGPIPE, and the command would inherit this
    os.execvp(command[0], command)


def tie(parent: int) -> None:
    """Let the kernel kill this process when the thread of `parent` that made it ends. Raises SystemExit if `parent` has ended."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the line above, so no signal will come
        raise SystemExit(0)


if __name__ == "__main__":
    become(int(sys.argv[1]), sys.argv[2:])
