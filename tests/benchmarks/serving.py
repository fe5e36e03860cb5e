"""What the peers' services share: which model they serve, how their process is started, warmed up and ended."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil

from pipefleet.contract.references import split_uri
from tests.benchmarks.measurement import Machine
from tests.benchmarks.workloads import Workload, decode

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "PIPEFLEET_BENCH_SERVICE"
READY_SECONDS = 180.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Served:
    """The model that a service's process loads; travels in its environment."""

    task: str
    model: str
    parameters: dict[str, Any]
    machine: Machine

    @classmethod
    def of(cls, workload: Workload, machine: Machine) -> Served:
        """What serves `workload`."""
        return cls(workload.task, workload.model, workload.parameters, machine)

    @classmethod
    def from_environment(cls) -> Served:
        """What this process was told to serve."""
        fields = json.loads(os.environ[VARIABLE])
        return cls(**{**fields, "machine": Machine(**fields["machine"])})

    def environment(self) -> dict[str, str]:
        """The environment of the service's process."""
        return {**os.environ, **self.machine.environment(), VARIABLE: json.dumps(asdict(self))}

    def load(self) -> Any:
        """transformers' pipeline."""
        return self.machine.load(self.task, self.model)

    def fetched(self, item: str) -> Any:
        """An item as a pipeline takes it; media are read from object storage."""
        if not item.startswith("s3://"):
            return item
        bucket, key = split_uri(item)
        return decode(self.task, _s3().get_object(Bucket=bucket, Key=key)["Body"].read())

    def run(self, pipe: Any, inputs: Sequence[Any]) -> list[Any]:
        """JSON-ready outputs of a batch in arrival order, padded to its longest; a text's embedding is its tokens' mean."""
        if self.task == "feature-extraction":
            return _embedded(pipe, inputs)
        outputs = pipe(list(inputs), batch_size=len(inputs), **self.parameters)
        return list(outputs)


@functools.cache
def _s3() -> Any:
    return boto3.client("s3")


def _embedded(pipe: Any, texts: Sequence[str]) -> list[list[float]]:
    import torch

    with torch.inference_mode():
        inputs = pipe.tokenizer(list(texts), truncation=True, padding=True, return_tensors="pt").to(pipe.device)
        hidden = pipe.model(**inputs)[0]
        mask = inputs["attention_mask"][:, :, None]
        rows: list[list[float]] = ((hidden * mask).sum(1) / mask.sum(1)).float().cpu().tolist()
        return rows


@contextlib.contextmanager
def process(command: Sequence[str], served: Served, log: Path) -> Iterator[psutil.Process]:
    """A service's process in a session of its own; it and its children end with the block."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            command, cwd=ROOT, env=served.environment(), stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield psutil.Process(child.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def until_ready(service: psutil.Process, log: Path, attempt: Callable[[], bool]) -> None:
    """Repeat `attempt` until it is true. Raises RuntimeError with the end of the log when the process ends or time is up."""
    deadline, pause = time.monotonic() + READY_SECONDS, threading.Event()
    while not attempt():
        ended = not service.is_running() or service.status() == psutil.STATUS_ZOMBIE
        if ended or time.monotonic() > deadline:
            raise RuntimeError(f"{log.stem} {'ended' if ended else 'is not ready'}:\n{log.read_text()[-3000:]}")
        pause.wait(0.1)
