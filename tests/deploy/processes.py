"""Servers of the tests: child processes on free loopback ports, each ended by the one who started it."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

SECONDS = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; below 55000, because one server adds 10000 to one of them."""
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
            if port < 55_000:
                found.append(port)
        return found


@contextmanager
def running(
    command: Sequence[str | Path], *, cwd: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives as long as the block; its output goes to `cwd`/log."""
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with (cwd / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(one) for one in command], cwd=cwd, env={**inherited, **environment},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], *, log: Path) -> None:
    """Wait until `condition` holds; fails with the log when the process ends or takes too long."""
    end = time.monotonic() + SECONDS
    while not condition():
        alive = process.poll() is None and time.monotonic() < end
        assert alive, f"{process.args!r} is not ready, exit code {process.poll()}: {log.read_text()[-2000:]}"
        time.sleep(0.05)


def status(url: str, *, user: str = "", method: str = "GET", body: bytes | None = None) -> int:
    """The HTTP status that `url` answers with; 0 where nobody answers."""
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
