"""Worker processes of the stack: one child each, ready when the file appears that it was told to write."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .children import ChildSpec
from .service import ChildService, Site

WorkerCommand = Callable[[str, Path], Sequence[str]]
"""(pool, ready file) -> the command line of one worker, which creates the file once it consumes."""


def worker_command(pool: str, ready_file: Path) -> list[str]:
    """Return the command line of pipefleet's own worker for `pool`."""
    return [sys.executable, "-m", "pipefleet", "worker", "--pool", pool, "--ready-file", str(ready_file)]


class WorkerProcess(ChildService):
    """Worker number `number` (from 1, counted over the stack) for `pool`; keeps count of its `restarts`."""

    def __init__(self, site: Site, pool: str, *, number: int, command: WorkerCommand) -> None:
        super().__init__(f"worker-{pool}-{number}", site)
        self.pool = pool
        self.restarts = 0
        self._command = command
        self._ready_file = site.folder("run") / f"{self.name}.ready"

    def start(self, environment: Mapping[str, str], *, grace: float) -> None:
        """Start the process without waiting for it; `grace` is what it gets to finish at the stop, in s."""
        self._ready_file.unlink(missing_ok=True)
        self.child = self._site.children.start(
            ChildSpec(
                name=self.name,
                argv=self._command(self.pool, self._ready_file),
                cwd=self._site.data,
                log=self._site.log(self.name),
                env={**environment, "PYTHONUNBUFFERED": "1"},
                rank=1,
                grace=grace,
                keep=self._site.lock,
            )
        )

    def restart(self) -> None:
        """Start the ended process again, as before, and count it; its log is kept as `.1`."""
        assert self.child is not None
        self.restarts += 1
        self._ready_file.unlink(missing_ok=True)
        self.child.start()

    def _answers(self) -> bool:
        return self._ready_file.exists()
