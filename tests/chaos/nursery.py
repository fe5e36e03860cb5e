"""A process that has imported what a worker needs and forks one at each request, in a second instead of eight.

stdin has a JSON line for each start: `{"log": path, "environment": {…}, "arguments": […]}`; stdout answers `{"started": pid}`
and, when one ended, `{"ended": pid, "code": code}` with the negative signal for one that was killed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import sys
import time
from typing import Any

LOOK_SECONDS = 0.02
MODULES = (
    *("celery.apps.worker", "celery.worker.consumer", "transformers.models.bert.modeling_bert"),
    *("pipefleet.cli", "pipefleet_workers.build", "pipefleet_workers.delivery.transport", "pipefleet_workers.worker"),
    "tests.chaos.saboteur",
)


def main() -> int:
    """Serve requests until stdin ends; in a worker, its exit code."""
    import_all()
    answer({"ready": os.getpid()})
    buffer = b""
    while True:
        if select.select([0], [], [], LOOK_SECONDS)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                return 0
            *lines, buffer = (buffer + read).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if not pid:
                    return work(request)
                answer({"started": pid})
        reap()


def import_all() -> None:
    """What takes long; nothing here starts a thread or opens a connection, which a fork would break."""
    for module in MODULES:
        importlib.import_module(module)


def answer(value: dict[str, Any]) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        answer({"ended": pid, "code": os.waitstatus_to_exitcode(status)})


def work(request: dict[str, Any]) -> int:
    """Become a worker, which ends with the nursery."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for own, other in ((0, nothing), (1, log), (2, log)):
        os.dup2(other, own)
    os.environ.clear()
    os.environ.update(request["environment"])
    skew = float(os.environ.get("CHAOS_CLOCK", "0"))
    if skew:
        real = time.time
        time.time = lambda: real() + skew
    from pipefleet.cli import main as command
    from tests.chaos.saboteur import sabotage

    sabotage()
    return command(request["arguments"])


if __name__ == "__main__":
    sys.exit(main())
