"""The common base of the stack's parts: one child process each, and a wait for several parts at once.

`RedisServer`, `S3Server`, `Flower` and `WorkerProcess` derive from `ChildPart`; `Stack` makes their `Site` and waits for them.
StackError: a part has ended, or is not ready in time. PortTakenError: another program took its port, so another start may help.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from pipefleet_workers.fleet.local.children import Child, Children
from pipefleet_workers.fleet.local.credentials import Credentials
from pipefleet_workers.fleet.local.errors import PortTakenError, StackError
from pipefleet_workers.fleet.local.files import private_folder
from pipefleet_workers.fleet.local.ports import PortBook

_POLL_SECONDS = 0.03
_TAKEN = ("address already in use", "is not available on 127.0.0.1")


@dataclass(frozen=True)
class Yard:
    """A folder and the processes that keep their files there.

    `lock` is the descriptor of a lock, which children inherit. Workers run in the folder `cwd`; None is `data`.
    """

    data: Path
    children: Children
    lock: int | None = None
    cwd: Path | None = None

    def folder(self, name: str) -> Path:
        """A folder of the data directory; created when missing."""
        return private_folder(self.data / name)

    def log(self, name: str) -> Path:
        """The path of the log of the part called `name`."""
        return self.data / "logs" / f"{name}.log"


@dataclass(frozen=True, kw_only=True)
class Site(Yard):
    """The data directory of a stack and the things that all its parts share."""

    ports: PortBook
    credentials: Credentials


_Yard = TypeVar("_Yard", bound=Yard)


class Part(Protocol):
    """A part that can be waited for."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    def ready(self) -> bool:
        """Whether it answers now. Raises StackError if it will never answer."""


class ChildPart(Generic[_Yard]):
    """Base of the parts with one child process, with the common form of `stop` and `wait_ready`."""

    child: Child | None = None

    def __init__(self, name: str, site: _Yard) -> None:
        self.name = name
        self._site = site

    def ready(self) -> bool:
        """Whether it answers now. Raises StackError if it has ended; PortTakenError if it ended because its port was taken."""
        if self.child is None:
            raise StackError(f"{self.name} has not been started")
        if self.child.ended():
            taken = any(mark in self.child.log_tail().lower() for mark in _TAKEN)
            raise (PortTakenError if taken else StackError)(self.child.epitaph())
        return self._answers()

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Return once it answers. Raises StackError after `timeout` seconds or when its process has ended."""
        wait_ready([self], timeout)

    def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL after its grace. A second call does nothing."""
        child, self.child = self.child, None
        if child is not None:
            self._site.children.stop_one(child)

    def _answers(self) -> bool:
        raise NotImplementedError


def wait_ready(parts: Sequence[Part], timeout: float) -> None:
    """Return once all of `parts` answered. Raises StackError with the missing parts after `timeout` s."""
    deadline = time.monotonic() + timeout
    missing = list(parts)
    while missing := [part for part in missing if not part.ready()]:
        if time.monotonic() > deadline:
            names = ", ".join(part.name for part in missing)
            raise StackError(f"not ready after {timeout:g} s: {names}; read their logs in the data directory")
        time.sleep(_POLL_SECONDS)
