"""The ways to do the work. Each runs in a process of its own with the same threads, models loaded and warmed before the clock."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.limit import hand_written
from tests.benchmarks.workloads import WORKLOADS, Workload, decode_item

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Measurement:
    """Wall and CPU seconds of one run, and its outputs by item."""

    seconds: float
    cpu_seconds: float
    outputs: dict[str, Any]


def in_subprocess(contender: str, workload: str, count: int, scratch: Path) -> Measurement:
    """Run one contender in a fresh process with the environment that workers use."""
    target = scratch / f"{contender}-{workload}.pickle"
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.benchmarks.contenders", contender, workload, str(count), str(target)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    with target.open("rb") as file:
        return Measurement(*pickle.load(file))


def one_by_one(pipe: Any, workload: Workload) -> list[Any]:
    """`pipeline(x)` in a loop: what most scripts do."""
    return [_reduced(workload, pipe(decode_item(workload, name), **workload.parameters)) for name in workload.items]


def batched(pipe: Any, workload: Workload) -> list[Any]:
    """`pipeline(generator, batch_size=32)`: what the documentation advises for throughput."""
    stream = (decode_item(workload, name) for name in workload.items)
    return [_reduced(workload, one) for one in pipe(stream, batch_size=32, **workload.parameters)]


def _reduced(workload: Workload, output: Any) -> Any:
    """A pipeline's output in the form in which all contenders are compared: embeddings as their mean."""
    if workload.task == "feature-extraction":
        return np.asarray(output, dtype=np.float32)[0].mean(axis=0)
    return output


CONTENDERS: dict[str, Callable[[Any, Workload], list[Any]]] = {
    "pipeline one by one": one_by_one,
    "pipeline batch_size=32": batched,
    "the limit, by hand": hand_written,
}


def agree(workload: Workload, ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The share of items on which two contenders agree: cosine above 0.999, or the same text."""
    same = 0
    for name in workload.items:
        mine, other = ours[name], theirs[name]
        if workload.task == "feature-extraction":
            a, b = np.asarray(mine, dtype=np.float64).ravel(), np.asarray(other, dtype=np.float64).ravel()
            same += bool(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.999)
        else:
            same += json.dumps(mine) == json.dumps(other)
    return same / len(workload.items)


def main() -> None:
    """Run one contender on one workload and pickle its measurement."""
    parser = argparse.ArgumentParser()
    for name in ("contender", "workload", "count", "target"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    import torch
    from transformers import pipeline

    workload = WORKLOADS[arguments.workload](int(arguments.count))
    pipe = pipeline(workload.task, model=workload.model, device="cpu", dtype=torch.float32)
    pipe(decode_item(workload, next(iter(workload.items))), **workload.parameters)
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = CONTENDERS[arguments.contender](pipe, workload)
    seconds = (time.perf_counter() - wall, time.process_time() - cpu)
    with open(arguments.target, "wb") as file:
        pickle.dump((*seconds, dict(zip(workload.items, outputs, strict=True))), file)


if __name__ == "__main__":
    main()
