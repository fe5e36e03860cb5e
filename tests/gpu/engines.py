"""Tiny models on a device, and engines around them. The checks call `load` and `engine`."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.items import Batch, Decoded, ItemError, Outcome, Unit
from pipefleet_workers.models.load import load_pipeline
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.settings import WorkerSettings
from tests.checkpoints import cached
from tests.parity.harness import SECONDS, Call, Running, finished

TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}
"""Largest difference to the CPU, relative to the largest number of a result."""


def load(checkpoint: str, device: str) -> Any:
    """transformers' pipeline of a tiny checkpoint in float32 on a device."""
    exact()
    task = checkpoint.partition(":")[0]
    name = RUNTIME[task].transformers_task or task
    pipe = transformers.pipeline(name, model=str(cached(checkpoint)), device=device, dtype=torch.float32)
    pipe.model.eval()
    return pipe


def served(checkpoint: str, device: str) -> Any:
    """The same, loaded as a worker loads it."""
    exact()
    task = checkpoint.partition(":")[0]
    return load_pipeline(Pool("gpu", task, str(cached(checkpoint)), device=device, dtype="float32"))


def exact() -> None:
    """Let a GPU compute float32 in float32: by default its convolutions round their inputs to ten bits."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def tolerance(device: str) -> float:
    """The entry of `TOLERANCE` for a device."""
    return TOLERANCE[device.partition(":")[0]]


def noting(adapter: Adapter) -> Any:
    """The adapter itself, which from now on counts its items and units and keeps its `batches`."""
    noted: Any = adapter
    noted.batches, noted.prepared_items, noted.prepared_units = [], 0, 0
    prepare, run, counting = adapter.prepare, adapter.run, threading.Lock()

    def counted(decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        prepared = prepare(decoded)
        with counting:
            noted.prepared_items += len(prepared)
            noted.prepared_units += sum(len(units) for units in prepared if isinstance(units, list))
        return prepared

    def kept(inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        noted.batches.append(Batch(units[0].key, list(units)))
        return run(inputs, units, progress)

    noted.prepare, noted.run = counted, kept
    return noted


class Held(Running):
    """An engine whose device gets no batch before `gate` opens."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        take = self.engine.room.take

        def after_the_gate(*arguments: Any) -> Any:
            self.gate.wait(SECONDS)
            return take(*arguments)

        self.engine.room.take = after_the_gate  # type: ignore[method-assign]

    def together(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcomes of calls whose units all wait before the device takes its first batch, so that they share batches.

        Only once for each engine: later on the threads of its device wait behind the gate.
        """
        _, sink = self.submit(calls)
        adapter = self.adapter
        _until(lambda: adapter.prepared_items == len(calls) and len(self.engine.room) == adapter.prepared_units)
        self.gate.set()
        return finished(sink)


@contextlib.contextmanager
def engine(
    pipe: Any,
    task: str,
    *,
    adapter: Any = None,
    settings: WorkerSettings | None = None,
    max_cost: int = 1 << 40,
    max_items: int = 64,
    held: bool = False,
) -> Iterator[Held]:
    """A started engine around an adapter that notes its batches, stopped at the end. Its batches may be large.

    With `held` the gate is closed at first, as `Held.together` needs it.
    """
    made = noting((adapter or RUNTIME[task].adapter)(pipe))
    limits = BatchLimits(max_cost, max_items, SECONDS)
    one = Held(made, task, limits, settings or WorkerSettings(), Instruments(Metrics("gpu")))
    if not held:
        one.gate.set()
    one.engine.start()
    try:
        yield one
    finally:
        one.gate.set()
        one.engine.stop(SECONDS)


def outputs(outcomes: Sequence[Outcome]) -> list[Any]:
    """The outputs. Raises RuntimeError for the first item that failed."""
    for outcome in outcomes:
        if outcome.failure is not None:
            failure = outcome.failure
            raise RuntimeError(f"item {outcome.work.item.id} failed with {failure.code}: {failure.message}")
    return [outcome.output for outcome in outcomes]


def _until(condition: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("not all units came to wait for the device")
        time.sleep(0.002)
