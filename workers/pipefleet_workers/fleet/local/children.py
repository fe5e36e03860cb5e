"""Child processes that never outlive this process: started in order, watched, stopped in reverse order.

The parts of the stack use it through `part.ChildPart`. A start that fails raises nothing: it shows as a child that has ended.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipefleet.printable import printable
from pipefleet_workers.fleet.local.errors import StackError
from pipefleet_workers.fleet.local.files import private_folder
from pipefleet_workers.fleet.local.relay import Relay
from pipefleet_workers.process import tether

_TETHER = Path(tether.__file__)
_POLL_SECONDS = 0.02
_TAIL_BYTES = 16384
_LINE = 1000
"""Characters of a log's line that are shown."""


@dataclass(frozen=True)
class ChildSpec:
    """The command of a child, and how to end it.

    `rank` orders the stop: higher ranks end first, equal ranks together. `grace` is the time in seconds between SIGTERM and
    SIGKILL. `env` is the whole environment. The child inherits the descriptor `keep`. Its output goes to `log`, or to a `relay`.
    """

    name: str
    argv: Sequence[str]
    cwd: Path
    log: Path
    env: Mapping[str, str] = field(repr=False)
    rank: int = 0
    grace: float = 5.0
    keep: int | None = None
    relay: Relay | None = None


class Child:
    """One process in a session of its own, so that the terminal's Ctrl-C does not reach it.

    Its output goes to `spec.log`; the log of the previous run is kept beside it with the suffix `.1`. One thread at a time may call
    it.
    """

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self._process: Future[subprocess.Popen[bytes]] | None = None

    @property
    def name(self) -> str:
        """The name in the spec."""
        return self.spec.name

    @property
    def pid(self) -> int:
        """Process id of the last start. Raises StackError before the first start."""
        return self._started().pid

    def start(self) -> None:
        """Start the process, or start it again after it ended; a command that cannot run ends at once."""
        if self.spec.relay is None:
            _rotate(self.spec.log)
        self._process = _forker(os.getpid()).submit(_spawn, self.spec)
        self._process.result()

    def ended(self) -> bool:
        """Whether the process has ended, or was never started; has no side effect."""
        if self._process is None:
            return True
        try:
            # WNOWAIT leaves the process unreaped, so its pid and group cannot be reused before `_finish`.
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    def epitaph(self) -> str:
        """How the process ended, with the last lines of its log unless a relay has shown them, for an error message."""
        if self.spec.relay is not None:
            return self._end()
        return f"{self._end()}; the end of {self.spec.log}:\n{self.log_tail()}"

    def last_words(self) -> str:
        """How the process ended, with the last line of its log, in one line of at most 300 characters."""
        lines = [line.strip() for line in self.log_tail().splitlines() if line.strip()]
        return f"{self._end()}: {lines[-1] if lines else 'its log is empty'}"[:300]

    def log_tail(self, lines: int = 15) -> str:
        """The last `lines` lines of the log, indented by two spaces."""
        if self.spec.relay is not None:
            return "\n".join(f"  {printable(line, _LINE)}" for line in self.spec.relay.last_lines()[-lines:])
        with contextlib.suppress(OSError), self.spec.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
            return "\n".join(f"  {printable(line, _LINE)}" for line in text.splitlines()[-lines:])
        return "  (no log)"

    @property
    def code(self) -> int:
        """How the process ended, as `subprocess` tells it: its exit code, or minus the number of the signal. Waits for the end."""
        return self._started().wait()

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the process to end by this signal; does nothing if it has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def finish(self) -> None:
        """Kill the process and the rest of its group, and reap it; does nothing if this is done."""
        if self._process is None or self._started().returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._started().wait()

    def _end(self) -> str:
        code = self.code
        return f"{self.name} " + (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        )

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise StackError(f"{self.name} has not been started")
        return self._process.result()


class Children:
    """The processes of one stack, in their order of start. One thread at a time may call it."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __iter__(self) -> Iterator[Child]:
        return iter(tuple(self._children))

    def start(self, spec: ChildSpec) -> Child:
        """Start a process and remember it."""
        child = Child(spec)
        # Remember it first: an interrupt inside `start` must not lose a process that is already running.
        self._children.append(child)
        child.start()
        return child

    def dead(self) -> list[Child]:
        """The processes that ended by themselves, in order of start."""
        return [child for child in self._children if child.ended()]

    def stop_one(self, child: Child) -> None:
        """End `child` within its grace and forget it."""
        _stop_together([child])
        if child in self._children:
            self._children.remove(child)

    def stop(self) -> None:
        """End all processes, highest rank first, equal ranks together. Returns when every process is reaped.

        Takes at most the sum over the ranks of the longest grace. A second call does nothing.
        """
        for rank in sorted({child.spec.rank for child in self._children}, reverse=True):
            _stop_together([child for child in self._children if child.spec.rank == rank])
        self._children.clear()


def _stop_together(children: list[Child]) -> None:
    for child in children:
        child.terminate()
    begin = time.monotonic()
    waiting = list(children)
    while waiting:
        elapsed = time.monotonic() - begin
        over = [child for child in waiting if child.ended() or elapsed > child.spec.grace]
        for child in over:
            child.finish()
            waiting.remove(child)
        if waiting:
            time.sleep(_POLL_SECONDS)


@functools.cache
def _forker(pid: int) -> ThreadPoolExecutor:
    """The one thread of process `pid` that forks.

    The kernel ties children to the thread that forked them, and the caller's thread may be short-lived. Kept by pid, since a fork
    of this process has none of its threads.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="pipefleet-fork")


def _spawn(spec: ChildSpec) -> subprocess.Popen[bytes]:
    tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
    with spec.log.open("ab") if spec.relay is None else os.fdopen(spec.relay.open(), "ab") as log:
        return subprocess.Popen(
            [*tether, *spec.argv],
            cwd=spec.cwd,
            env=dict(spec.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=() if spec.keep is None else (spec.keep,),
        )


def _rotate(log: Path) -> None:
    private_folder(log.parent)
    if log.exists():
        log.replace(log.with_name(f"{log.name}.1"))
    os.close(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600))
