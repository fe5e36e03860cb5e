"""Real workers in a second each, for tests with servers of their own: forked from one process that has imported all they need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.checkpoints import cached
from tests.servers import until

TASK = "text-classification"
START_SECONDS = 120.0


class Nursery:
    """Starts workers of one tiny model. `codes` are the exit codes of those that have ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = str(cached(TASK))
        self.codes: dict[int, int] = {}
        self._started: list[int] = []
        command = [sys.executable, "-m", "tests.chaos.nursery"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        self._ready = threading.Event()
        threading.Thread(target=self._listen, name="nursery", daemon=True).start()

    def start(self, environment: Mapping[str, str], *arguments: str) -> int:
        """Start a worker with this environment; the number of its process. Its log is `log(pid)`."""
        assert self._ready.wait(START_SECONDS)
        count = len(self._started)
        command = ["worker", "--task", TASK, "--model", self.model, "--device", "cpu", "--threads", "1", *arguments]
        settings = {**os.environ, "PIPEFLEET_WORKER_WARM_UP": "0", **environment}
        request = {"log": str(self.folder / f"{count}.log"), "environment": settings, "arguments": command}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        until(lambda: len(self._started) > count)
        return self._started[count]

    def log(self, pid: int) -> str:
        """What a worker has logged so far."""
        file = self.folder / f"{self._started.index(pid)}.log"
        return file.read_text() if file.exists() else ""

    def stop(self, pid: int) -> int:
        """End a worker with SIGTERM; its exit code."""
        if pid not in self.codes:
            os.kill(pid, signal.SIGTERM)
        until(lambda: pid in self.codes, 30.0)
        return self.codes[pid]

    def close(self) -> None:
        """End the nursery, and its workers with it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._note(json.loads(line))

    def _note(self, said: Mapping[str, Any]) -> None:
        if "ready" in said:
            self._ready.set()
        elif "started" in said:
            self._started.append(said["started"])
        else:
            self.codes[said["ended"]] = said["code"]


def long_texts(count: int) -> Sequence[str]:
    """Texts of about 200 bytes."""
    return [f"Call me Ishmael, number {index}. " + "Some years ago. " * 10 for index in range(count)]
