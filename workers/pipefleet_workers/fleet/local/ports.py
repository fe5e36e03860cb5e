"""Free loopback ports, the same as last time if possible, so that URLs survive a restart.

The parts of a stack ask its `PortBook` for ports by name; it remembers them in a file. If no port is free, it raises StackError.
"""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipefleet_workers.fleet.local.errors import StackError
from pipefleet_workers.fleet.local.files import write_private

LOOPBACK = "127.0.0.1"
# Below the kernel's ephemeral range (32768 and up), which outgoing connections draw from.
_LOWEST, _HIGHEST = 15000, 32767


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of 127.0.0.1 now; ports of closed connections count as free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


class PortBook:
    """Ports by name, remembered in `path`. Not thread-safe. Another program may take a port before its server binds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._remembered = _read(path)
        self._taken: set[int] = set()

    def take(self, names: Iterable[str]) -> dict[str, int]:
        """A free port for each of `names`: the remembered port, else a random port in 15000..32767.

        One book never returns a port twice. Raises StackError when no free port is found.
        """
        ports = {name: self._pick(name) for name in names}
        self._remembered.update(ports)
        write_private(self._path, json.dumps(self._remembered, indent=1, sort_keys=True) + "\n")
        return ports

    def forget(self) -> None:
        """Use no remembered port from now on, and no port that this book has returned."""
        self._taken.update(self._remembered.values())
        self._remembered.clear()

    def _pick(self, name: str) -> int:
        for port in self._candidates(name):
            if port not in self._taken and is_free(port):
                self._taken.add(port)
                return port
        raise StackError(f"no free port between {_LOWEST} and {_HIGHEST} on {LOOPBACK} for {name}; close some servers")

    def _candidates(self, name: str) -> Iterator[int]:
        if name in self._remembered:
            yield self._remembered[name]
        # Ports that are remembered under other names stay reserved.
        reserved = set(self._remembered.values())
        choices = random.sample(range(_LOWEST, _HIGHEST + 1), 2000)
        yield from (port for port in choices if port not in reserved)


def _read(path: Path) -> dict[str, int]:
    """The remembered ports; empty for a missing or damaged file, since only convenience is lost."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): int(port) for name, port in stored.items() if 1024 <= int(port) <= 65535}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
