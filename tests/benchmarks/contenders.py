"""The ways to do the work in one process: each in a fresh one, with the same threads, its model loaded and warm by then."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.limit import hand_written
from tests.benchmarks.measurement import Machine, Measurement
from tests.benchmarks.workloads import WORKLOADS, Workload, decode_item

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32
ONE_BY_ONE = "pipeline one by one"
LIMIT = "the limit, by hand"
ENGINE = "pipefleet, in process"
WARM_UP = 8
"""Items that run before the clock starts."""
ENGINE_WARM_UP = 128
"""The same for pipefleet, whose threads take slices of up to 32 texts: each of them has had one then."""


def in_subprocess(contender: str, workload: Workload, machine: Machine, scratch: Path) -> Measurement:
    """Run one contender in a fresh process; `workload` is made again there from its name and count."""
    target = scratch / f"{contender}-{workload.name}.pickle"
    order = json.dumps({"name": workload.name, "count": len(workload.items), **asdict(machine)})
    command = [sys.executable, "-m", "tests.benchmarks.contenders", contender, order, str(target)]
    environment = {**os.environ, **machine.environment()}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"contender {contender!r} on {workload.name} failed:\n{done.stderr[-3000:]}")
    with target.open("rb") as file:
        return Measurement(*pickle.load(file))


def one_by_one(pipe: Any, workload: Workload) -> list[Any]:
    """`pipeline(x)` in a loop: what most scripts do."""
    arguments = {**workload.parameters, **workload.pipeline_parameters}
    return [_kept(workload, pipe(decode_item(workload, name), **arguments)) for name in workload.items]


def batched(pipe: Any, workload: Workload) -> list[Any]:
    """`pipeline(generator, batch_size=32)`: what the documentation advises for throughput."""
    stream = (decode_item(workload, name) for name in workload.items)
    arguments = {**workload.parameters, **workload.pipeline_parameters}
    return [_kept(workload, one) for one in pipe(stream, batch_size=BATCH, **arguments)]


def pipefleet_engine(pipe: Any, workload: Workload) -> list[Any]:
    """pipefleet's engine without its transport."""
    from tests.benchmarks.in_process import through_the_engine

    return through_the_engine(pipe, workload)


def _kept(workload: Workload, output: Any) -> Any:
    return output.float().cpu().numpy()[0] if workload.task == "feature-extraction" else output


IN_PROCESS: dict[str, Callable[[Any, Workload], list[Any]]] = {
    ONE_BY_ONE: one_by_one,
    f"pipeline batch_size={BATCH}": batched,
    LIMIT: hand_written,
    ENGINE: pipefleet_engine,
}


def reduced(pipe: Any, workload: Workload, outputs: list[Any]) -> list[Any]:
    """Outputs in the form in which all contenders are compared, made outside the clock: a token matrix as its mean.

    With a batch size, the pipeline pads every text to the longest of its batch and returns the padding as well; only a text's
    own tokens count here.
    """
    if workload.task != "feature-extraction" or outputs[0].ndim == 1:
        return outputs
    encoded = pipe.tokenizer(list(workload.items.values()), truncation=True)["input_ids"]
    return [output[: len(ids)].mean(axis=0) for output, ids in zip(outputs, encoded, strict=True)]


def agree(workload: Workload, ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The share of items on which two contenders agree: cosine above 0.999, the same text, or the same top label.

    Only the items that `ours` has count: slow contenders get the first ones.
    """
    same = sum(_same(workload.task, ours[name], theirs[name]) for name in ours if name in theirs)
    return same / max(1, len(ours))


def _same(task: str, mine: Any, other: Any) -> bool:
    if task == "feature-extraction":
        a, b = np.asarray(mine, dtype=np.float64).ravel(), np.asarray(other, dtype=np.float64).ravel()
        return bool(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.999)
    if task == "automatic-speech-recognition":
        return bool(mine["text"] == other["text"])
    top, wanted = (value[0] if isinstance(value, list) else value for value in (mine, other))
    return bool(top["label"] == wanted["label"] and abs(top["score"] - wanted["score"]) < 0.01)


@dataclass(frozen=True)
class _Order:
    workload: Workload
    machine: Machine

    @classmethod
    def parse(cls, text: str) -> _Order:
        fields = json.loads(text)
        workload = WORKLOADS[fields.pop("name")](fields.pop("count"))
        return cls(workload, Machine(**fields))


def main() -> None:
    """Run one contender on one workload and pickle its measurement."""
    contender, order, target = sys.argv[1:]
    parsed = _Order.parse(order)
    workload, run = parsed.workload, IN_PROCESS[contender]
    pipe = parsed.machine.load(workload.task, workload.model)
    run(pipe, workload.first(ENGINE_WARM_UP if contender == ENGINE else WARM_UP))
    wall, cpu = time.perf_counter(), time.process_time()
    outputs = run(pipe, workload)
    seconds, used = time.perf_counter() - wall, time.process_time() - cpu
    found = dict(zip(workload.items, reduced(pipe, workload, outputs), strict=True))
    with open(target, "wb") as file:
        pickle.dump((seconds, {"process": used}, found), file)


if __name__ == "__main__":
    main()
