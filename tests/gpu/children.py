"""Runs every check in a child process: a check that crashes, hangs or breaks the device ends alone.

    checks ─▶ fork (torch is imported already, the device is not touched yet) ─▶ answer.json, or an exit code ─▶ Result

`__main__` calls `run_all`. A child that exceeds its time is killed with its whole group. Where a child dies,
the last line of its log becomes its sentence.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.gpu.plan import FAILED, PASSED, SKIPPED, Check, Order, Result, Skip

WORDS = 300
"""Characters of an error in the table."""
LAST_STACKS = 2.0
"""Seconds before its end in which a hanging child prints the stacks of its threads."""


@dataclass
class Child:
    """A check that runs."""

    check: Check
    order: Order
    process: Any
    begin: float

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() - self.begin > self.check.seconds

    def kill(self) -> None:
        """End it together with the processes that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet, or has ended
            self.process.kill()
        self.process.join()

    def result(self, *, late: bool) -> Result:
        """Its answer; without one, how it died."""
        seconds, answer = time.monotonic() - self.begin, self.order.folder / "answer.json"
        state, said = FAILED, f"no end within {self.check.seconds:.0f} s; {log_of(self.order)} has its stacks"
        if not late:
            said = f"its process ended with code {self.process.exitcode}: {_last_line(self.order)}"
        if answer.exists():
            state, said = json.loads(answer.read_text())
        return Result(self.check.name, self.check.part, state, said, round(seconds, 2), self.order.rows())


class Starts:
    """How processes start: `fork`, or `spawn` where a fork cannot use the device. A spawned one imports torch again."""

    way = "fork"


def run_all(
    checks: Sequence[Check], order: Order, *, jobs: int, seconds: float, on_result: Callable[[Result], None]
) -> list[Result]:
    """Run the checks, `jobs` at a time, those that are `alone` after all others. Results in the order of the checks.

    A check that could not end within `seconds` has failed.
    """
    end = time.monotonic() + seconds
    waiting = sorted(checks, key=lambda check: check.alone)
    running: list[Child] = []
    results: dict[str, Result] = {}

    def note(result: Result) -> None:
        results[result.name] = result
        on_result(result)

    try:
        while waiting or running:
            while waiting and _may_begin(waiting[0], running, jobs):
                check = waiting.pop(0)
                if time.monotonic() > end:
                    note(Result(check.name, check.part, FAILED, f"not begun: {seconds:.0f} s had passed", 0.0))
                else:
                    left = end - time.monotonic()
                    running.append(_begin(replace(check, seconds=min(check.seconds, left)), order))
            for child in _ended(running):
                note(child.result(late=child.process.exitcode == -signal.SIGKILL and child.late))
    finally:
        for child in running:
            child.kill()
    return [results[check.name] for check in checks]


def in_child(run: Callable[[], Any], seconds: float, log: Path) -> int:
    """Run a function in a process of its own; its exit code. For checks of how a process ends.

    Raises TimeoutError when it does not end. Call it before this process touches the device.
    """
    faulthandler.cancel_dump_traceback_later()  # its thread is not forked, and the child would wait for this thread
    process = _process(_redirected, run, log, seconds)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"a process that should have ended ran on for {seconds:.0f} s")
    return int(process.exitcode)


def log_of(order: Order) -> Path:
    """Where the child of an order writes what it prints."""
    return order.folder / "log.txt"


def _may_begin(check: Check, running: Sequence[Child], jobs: int) -> bool:
    if check.alone or any(child.check.alone for child in running):
        return not running
    return len(running) < jobs


def _begin(check: Check, order: Order) -> Child:
    own = Order(order.device, order.quick, order.folder / _file_name(check.name))
    own.folder.mkdir(parents=True, exist_ok=True)
    for file in ("answer.json", "rows.jsonl"):  # of an earlier run with the same folder
        (own.folder / file).unlink(missing_ok=True)
    forks = Starts.way == "fork"
    process = _process(_child, check, own) if forks else _process(_spawned, check.name, own)
    process.start()
    return Child(check, own, process, time.monotonic())


def _ended(running: list[Child]) -> Iterator[Child]:
    """Take the children out that have ended or whose time is over; waits a moment for the first."""
    if running:
        wait([child.process.sentinel for child in running], timeout=0.2)
    for child in list(running):
        if child.late:
            child.kill()
        if child.process.exitcode is not None:
            running.remove(child)
            yield child


def _process(run: Callable[..., None], *arguments: Any) -> Any:
    context: Any = multiprocessing.get_context(Starts.way)
    return context.Process(target=run, args=arguments)


def _spawned(name: str, order: Order) -> None:
    """Run a check by its name: functions of a check do not travel to a spawned process."""
    from tests.gpu.table import named

    Starts.way = "spawn"
    _child(named(name, order.device), order)


def _child(check: Check, order: Order) -> None:
    os.setsid()
    _redirect(log_of(order))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _print_stacks_before(check.seconds)
    try:
        answer = PASSED, check.run(order)
    except Skip as reason:
        answer = SKIPPED, str(reason)
    except BaseException as error:  # noqa: BLE001 - whatever a check raises is its result
        traceback.print_exc()
        answer = FAILED, f"{type(error).__name__}: {error}"[:WORDS]
    (order.folder / "answer.json").write_text(json.dumps(answer))
    _leave(0)


def _redirected(run: Callable[[], Any], log: Path, seconds: float) -> None:
    _redirect(log)
    _print_stacks_before(seconds)
    try:
        run()
    except BaseException:  # noqa: BLE001 - its exit code is what counts
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _redirect(log: Path) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    faulthandler.enable(file=2)


def _print_stacks_before(seconds: float) -> None:
    faulthandler.dump_traceback_later(max(1.0, seconds - LAST_STACKS), file=2)


def _leave(code: int) -> None:
    """End without waiting for threads of an engine or of a driver."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last_line(order: Order) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in log_of(order).read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:WORDS] if lines else "it printed nothing"
    return "it has no log"


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
