"""What one run of a contender gives, what every contender is told of the machine, and who used how much CPU time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
"""Set in every contender's process. Without the first, threads that spin while they wait collapse beside a neighbour."""


@dataclass(frozen=True)
class Machine:
    """The device, dtype and torch threads that all contenders use. `device` is `cpu` or `cuda:N`."""

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    @classmethod
    def detect(cls, *, device: str, dtype: str, threads: int | None) -> Machine:
        """`auto` is the first GPU where there is one; the threads are as many as the cores this process may use."""
        if device == "auto":
            import torch

            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        return cls(device, dtype, threads or len(os.sched_getaffinity(0)))

    @property
    def processes(self) -> int:
        """How many processes the hand loops use: one for each thread on a CPU; on a GPU two, so that one copies meanwhile."""
        return self.threads if self.device == "cpu" else 2

    def single_threaded(self) -> Machine:
        """The same with one torch thread."""
        return replace(self, threads=1)

    def environment(self) -> dict[str, str]:
        """What the process of a contender has in its environment."""
        return {**ENVIRONMENT, "OMP_NUM_THREADS": str(self.threads)}

    def load(self, task: str, model: str) -> Any:
        """transformers' pipeline on this device."""
        import torch
        from transformers import pipeline
        from transformers.utils import logging

        logging.disable_progress_bar()
        if self.device == "cpu":
            torch.set_num_threads(self.threads)
        pipe = pipeline(task, model=model, device=self.device, dtype=getattr(torch, self.dtype))
        pipe.model.eval()
        return pipe


@dataclass(frozen=True)
class Measurement:
    """Wall seconds of one run, CPU seconds by process, and outputs by item."""

    seconds: float
    cpu: dict[str, float]
    outputs: dict[str, Any]

    @property
    def rate(self) -> float:
        """Items a second."""
        return len(self.outputs) / self.seconds

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all processes."""
        return sum(self.cpu.values())


@dataclass
class Clock:
    """Wall and CPU seconds of a `timed` block, valid after it."""

    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)


@contextmanager
def timed(processes: Mapping[str, psutil.Process]) -> Iterator[Clock]:
    """Time the block: wall seconds, and CPU seconds of this process (`client`) and of others with their children."""
    clock = Clock()
    before = {name: cpu_seconds(process) for name, process in processes.items()}
    own, begin = time.process_time(), time.perf_counter()
    yield clock
    clock.seconds = time.perf_counter() - begin
    clock.cpu = {name: cpu_seconds(process) - before[name] for name, process in processes.items()}
    clock.cpu["client"] = time.process_time() - own


def cpu_seconds(process: psutil.Process) -> float:
    """User and system seconds so far: of a process, its living descendants, and those of them that have ended."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total
