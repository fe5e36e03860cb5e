"""Passes the output of a child on, line by line, with a label in front: the log of several workers becomes one.

`Child` opens a `Relay` for its process, and takes the last lines from it for a message; `supervise` makes one for each worker. With
JSON logs the label becomes the field `device` of each line. A reader of the output that is gone stops no child.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import deque
from typing import BinaryIO

LAST_LINES = 15
LONGEST = 1 << 16
"""Bytes of a line that stay together."""
LAST_SECONDS = 1.0
"""How long the last lines of a process that has ended may take to arrive: one of its own children may hold the pipe open."""


class Relay:
    """The output of one child after the other, in the one stream `into`, which other relays may share. Thread-safe."""

    def __init__(self, label: str, into: BinaryIO, *, lock: threading.Lock, as_json: bool = False) -> None:
        self._label, self._into, self._lock, self._as_json = label, into, lock, as_json
        self._last: deque[bytes] = deque(maxlen=LAST_LINES)
        self._reader: threading.Thread | None = None

    def open(self) -> int:
        """A descriptor for the output of the next process; the caller closes it."""
        read, write = os.pipe()
        self._last.clear()
        # This thread is no service: it ends with the output of the process.
        self._reader = threading.Thread(target=self._pass_on, args=(read,), name=f"relay-{self._label}", daemon=True)
        self._reader.start()
        return write

    def last_lines(self) -> list[str]:
        """The last lines of a process that has ended."""
        self.finish(LAST_SECONDS)
        return [line.decode(errors="replace").rstrip("\n") for line in tuple(self._last)]

    def finish(self, seconds: float) -> None:
        """Return when the output of a process that has ended is passed on, at the latest after so many seconds."""
        if self._reader is not None:
            self._reader.join(seconds)

    def _pass_on(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as output:
            while line := output.readline(LONGEST):
                self._last.append(line)
                with self._lock, contextlib.suppress(OSError, ValueError):
                    self._into.write(labelled(line, self._label, as_json=self._as_json))
                    self._into.flush()


def labelled(line: bytes, label: str, *, as_json: bool) -> bytes:
    """A line with its label, and with a line break at its end."""
    line = line if line.endswith(b"\n") else line + b"\n"
    if as_json and line.startswith(b'{"'):
        return b'{"device": ' + json.dumps(label).encode() + b", " + line[1:]
    return f"[{label}] ".encode() + line
