"""Contenders in fresh processes of their own: one, or several that draw from the same pieces of the work.

    load the model ─▶ warm up ─▶ "ready" ─▶ (the clock starts) ─▶ run ─▶ CPU seconds ─▶ (it stops) ─▶ outputs

The processes are forked from one that has imported everything and run nothing (`preloaded`). A contender that fails raises
RuntimeError with its traceback.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from pipefleet_workers.fleet.local.environment import in_environment
from tests.benchmarks.measurement import Machine, Measurement
from tests.benchmarks.workloads import Workload

READY, START, OUTPUTS = "ready", "start", "outputs"
END_SECONDS = 10.0

Run = Callable[[Any, Workload, Iterator[int]], dict[str, Any]]
"""A contender: the outputs by name of what it drew; the iterator gives the numbers of the pieces that it may take."""


class Drawn(Protocol):
    """A number that several processes raise, with its lock."""

    value: int

    def get_lock(self) -> Any: ...


@dataclass(frozen=True)
class Task:
    """What each process is told."""

    run: Run
    workload: Workload
    warm_up: int
    machine: Machine
    pieces: int


def run(task: Task, processes: int) -> Measurement:
    """Run `task` in so many processes at once; the outputs of all of them in the order of the items."""
    context = _context(task.machine)
    drawn = context.Value("i", 0)
    with contextlib.ExitStack() as held:
        channels = [held.enter_context(_started(context, task, drawn)) for _ in range(processes)]
        for channel in channels:
            _received(channel)
        begin = time.perf_counter()
        used = _told(channels, START)
        seconds = time.perf_counter() - begin
        found = _told(channels, OUTPUTS)
    outputs = {name: output for part in found for name, output in part.items()}
    return Measurement(seconds, {"process": sum(used)}, {name: outputs[name] for name in task.workload.items})


def numbers(drawn: Drawn, count: int) -> Iterator[int]:
    """Numbers below `count`, each given to one of the processes that share `drawn`."""
    while True:
        with drawn.get_lock():
            number = drawn.value
            drawn.value += 1
        if number >= count:
            return
        yield number


def _context(machine: Machine) -> Any:
    """Its server process takes over the environment when it is first used, so all contenders have the same."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.preloaded"])
    with in_environment(machine.environment()):
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _started(context: Any, task: Task, drawn: Drawn) -> Iterator[Connection]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, task, drawn), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
        process.join(END_SECONDS)
    finally:
        ours.close()
        process.kill()
        process.join()


def _told(channels: Sequence[Connection], word: str) -> list[Any]:
    """What each process answers to a word that all are sent before any is heard."""
    for channel in channels:
        channel.send(word)
    return [_received(channel) for channel in channels]


def _received(channel: Connection) -> Any:
    """What a process sends next. Raises RuntimeError when it failed or is gone."""
    try:
        good, value = channel.recv()
    except EOFError:
        raise RuntimeError("the process of a contender ended without a word") from None
    if not good:
        raise RuntimeError(value)
    return value


def _work(channel: Connection, task: Task, drawn: Drawn) -> None:
    """The life of one process. An interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for value in _steps(task, drawn, channel.recv):
            channel.send((True, value))
    except Exception:  # noqa: BLE001 - told to the parent, whatever it is
        channel.send((False, traceback.format_exc()[-3000:]))


def _steps(task: Task, drawn: Drawn, told: Callable[[], Any]) -> Iterator[Any]:
    pipe = task.machine.load(task.workload.task, task.workload.model)
    if task.warm_up:
        task.run(pipe, task.workload.first(task.warm_up), iter(range(task.pieces)))
    yield READY
    told()
    before = time.process_time()
    outputs = task.run(pipe, task.workload, numbers(drawn, task.pieces))
    yield time.process_time() - before
    told()
    yield reduced(pipe, task.workload, outputs)


def reduced(pipe: Any, workload: Workload, outputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs in the form in which all contenders are compared, made outside the clock: a token matrix as its mean.

    With a batch size, the pipeline pads every text to the longest of its batch and returns the padding as well; only a text's
    own tokens count here.
    """
    matrices = [name for name, output in outputs.items() if getattr(output, "ndim", 0) == 2]
    if workload.task != "feature-extraction" or not matrices:
        return outputs
    encoded: Sequence[Any] = pipe.tokenizer([workload.items[name] for name in matrices], truncation=True)["input_ids"]
    lengths = dict(zip(matrices, map(len, encoded), strict=True))
    return outputs | {name: outputs[name][:length].mean(axis=0) for name, length in lengths.items()}
