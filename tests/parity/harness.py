"""An engine in this process, fed with items whose objects are already fetched; and the comparison of results.

with running(adapter, spec) as engine:  results = engine.run([Call(inputs, parameters), …])
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pipefleet.contract.messages import JobItem
from pipefleet.contract.records import JobFailure
from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Audio, Batch, Blob, Decoded, ItemError, JobContext, Outcome, Unit, Work
from pipefleet_workers.models.lanes import Lanes
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.process.exit_codes import end_process
from pipefleet_workers.results.lines import ResultWriter
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.checkpoints import cached

SECONDS = 120.0
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """One call of a pipeline: its argument as transformers takes it, and its keyword arguments."""

    inputs: Any
    parameters: Mapping[str, Any] = field(default_factory=dict)


def load(checkpoint: str) -> Any:
    """A pipeline of a tiny checkpoint, as the worker loads it."""
    torch.set_num_threads(1)  # tiny models only lose by sharing their work
    task = checkpoint.partition(":")[0]
    name = RUNTIME[task].transformers_task or task
    pipe = transformers.pipeline(name, model=str(cached(checkpoint)), device="cpu", dtype=torch.float32)
    pipe.model.eval()
    return pipe


def on_the_wire(value: Any) -> Any:
    """An argument of a pipeline with a Blob in the place of every picture, recording and file, as after fetching."""
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return Blob("s3://test/picture.png", buffer.getvalue(), "image/png")
    if isinstance(value, np.ndarray):
        return Blob("s3://test/samples.f32", value.astype("<f4").tobytes(), RAW_AUDIO)
    if isinstance(value, Path):
        return Blob(f"s3://test/{value.name}", value.read_bytes(), None)
    if isinstance(value, Mapping):
        return {name: on_the_wire(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [on_the_wire(item) for item in value]
    return value


class _Heard:
    """A `Progress` that calls `on_tick` at each sign of life as well."""

    def __init__(self, inner: Progress, on_tick: Callable[[], None]) -> None:
        self._inner = inner
        self._on_tick = on_tick

    def tick(self) -> None:
        self._inner.tick()
        self._on_tick()

    def stopped(self, job: JobContext) -> JobFailure | None:
        return self._inner.stopped(job)

    def remains(self, unit: Unit) -> bool:
        return self._inner.remains(unit)

    def release(self, unit: Unit, output: Any) -> None:
        self._inner.release(unit, output)


class _Recording(Adapter):
    """Mixed into an adapter: notes what it did, and holds the device back while `gate` is closed."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[Batch] = []
        self.on_tick: Callable[[], None] = lambda: None
        self.prepared_items = 0
        self.prepared_units = 0
        self._counting = threading.Lock()

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        prepared = super().prepare(decoded)
        with self._counting:
            self.prepared_items += len(prepared)
            self.prepared_units += sum(len(units) for units in prepared if isinstance(units, list))
        return prepared

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        self.entered.set()
        assert self.gate.wait(SECONDS), "the test never opened the gate"
        self.batches.append(Batch(units[0].key, list(units)))
        return super().run(inputs, units, _Heard(progress, self.on_tick))


def recording(adapter: Callable[[Any], Adapter], pipe: Any) -> Any:
    """The adapter that `adapter` makes, noting its batches and with a gate before the device."""
    kind = adapter if isinstance(adapter, type) else type(adapter(pipe))
    return type(f"Recording{kind.__name__}", (_Recording, kind), {})(pipe)


class Readers:
    """Passes tokens on to the tests that read along, in the device's thread."""

    def __init__(self, readers: Mapping[str, Callable[[Sequence[int]], object]]) -> None:
        self._readers = readers

    def start(self) -> None:
        """No thread of its own."""

    def stop(self, timeout: float | None = None) -> bool:
        """No thread of its own."""
        return True

    def wrote(self, unit: Unit, tokens: Sequence[int]) -> None:
        self._readers[unit.assembly.work.job.id](list(tokens))

    def ended(self, job: JobContext) -> None:
        """Nobody waits for it."""


class Running:
    """A started engine around one recording adapter."""

    def __init__(
        self,
        adapter: Any,
        task: str,
        limits: BatchLimits,
        settings: WorkerSettings,
        instruments: Instruments,
        results: ResultWriter | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self.adapter = adapter
        row, spec = RUNTIME[task], task_spec(task)
        decoder = Decoder(spec, settings, sampling_rate=adapter.sampling_rate)
        self.readers: dict[str, Callable[[Sequence[int]], object]] = {}
        stages = Stages(
            Fetcher(WorkerStore(), settings), decoder, adapter, results=results, streams=Readers(self.readers)
        )
        self.engine = Engine(stages, limits, settings, instruments, slice_items=row.sizing.slice_items, lanes=lanes)

    def submit(
        self,
        calls: Sequence[Call],
        *,
        bulk: bool = False,
        read: Callable[[Sequence[int]], object] | None = None,
        **context: Any,
    ) -> tuple[JobContext, Outcomes]:
        """Admit one job with an item for each call; `context` overrides fields of its JobContext.

        `read` gets the tokens of an item's first sequence so far, whenever there are more.
        """
        if read is not None:
            context["streams"] = True
            self.readers[context.get("id", "job")] = read
        sink = Outcomes(range(len(calls)))
        fields: dict[str, Any] = {"id": "job", "run_id": None, "parameters": {}, "priority": 3, "deadline": None}
        job = JobContext(**{**fields, "sink": sink, **context})
        works = [
            Work(
                job, position, JobItem(str(position), on_the_wire(call.inputs)), dict(call.parameters), 1, fetches=False
            )
            for position, call in enumerate(calls)
        ]
        self.engine.admit(works, bulk=bulk)
        return job, sink

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Admit the calls as one job and wait for its outcomes, in order."""
        return finished(self.submit(calls)[1])

    def run_together(self, calls: Sequence[Call]) -> list[Outcome]:
        """As `run`, but the device gets nothing before all units wait for it, so that they share batches."""
        adapter = self.adapter
        adapter.gate.clear()
        adapter.entered.clear()
        _, plug = self.submit(calls[:1])
        wait_until(adapter.entered.is_set, "the first batch reaches the device")
        in_device = adapter.prepared_units - len(self.engine.room)
        items, units = adapter.prepared_items + len(calls), in_device
        _, sink = self.submit(calls)
        wait_until(
            lambda: adapter.prepared_items >= items and len(self.engine.room) == adapter.prepared_units - units,
            "every unit waits for the device",
        )
        adapter.gate.set()
        finished(plug)
        return finished(sink)


def finished(sink: Outcomes) -> list[Outcome]:
    """The outcomes of a job, in order; fails when they do not come."""
    sink.wait(SECONDS)
    assert sink.complete, "the engine did not finish the job"
    return sink.in_order()


def wait_until(condition: Any, what: str) -> None:
    """Wait for a condition that no event tells of."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.002)


@contextlib.contextmanager
def running(
    adapter: Any,
    task: str,
    *,
    limits: BatchLimits | None = None,
    settings: WorkerSettings | None = None,
    results: ResultWriter | None = None,
    on_fatal: Callable[[int, str], None] = end_process,
    lanes: Lanes | None = None,
) -> Iterator[Running]:
    """A started engine, stopped at the end."""
    # Rows have a cost for real models; here a batch may hold whatever is exact.
    chosen = limits or BatchLimits(max_cost=1 << 40, max_items=64, max_age=SECONDS)
    instruments = Instruments(Metrics("test"), on_fatal=on_fatal)
    one = Running(adapter, task, chosen, settings or WorkerSettings(), instruments, results, lanes)
    one.engine.start()
    try:
        yield one
    finally:
        adapter.gate.set()
        one.engine.stop()


def plain(value: Any) -> Any:
    """A result as plain lists, dicts, texts and numbers."""
    if isinstance(value, torch.Tensor):
        return value.float().numpy()
    if isinstance(value, Image.Image):
        return np.asarray(value)
    if isinstance(value, Audio):
        return value.samples
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def assert_same(found: Any, wanted: Any, where: str = "result") -> None:
    """Texts, labels, lengths and shapes are equal; numbers within 1e-4, levels of a picture within 1."""
    found, wanted = plain(found), plain(wanted)
    if isinstance(found, np.ndarray) or isinstance(wanted, np.ndarray) or _is_matrix(wanted):
        assert np.shape(found) == np.shape(wanted), where
        difference = np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64))
        # A level of a picture may round the other way, here and there.
        limit, share = (1.0, 0.01) if np.asarray(wanted).dtype == np.uint8 else (TOLERANCE, TOLERANCE)
        assert difference.size == 0 or float(difference.max()) <= limit, f"{where}: {difference.max():.2e}"
        assert difference.size == 0 or float(difference.mean()) <= share, f"{where}: {difference.mean():.2e} on average"
    elif isinstance(wanted, dict):
        assert isinstance(found, dict), where
        assert list(found) == list(wanted), where
        for name in wanted:
            assert_same(found[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, list):
        assert isinstance(found, list), where
        assert len(found) == len(wanted), where
        for index, (left, right) in enumerate(zip(found, wanted, strict=True)):
            assert_same(left, right, f"{where}[{index}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=TOLERANCE), where
    else:
        assert (type(found), found) == (type(wanted), wanted), where


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], list | float) and _numbers(value)


def _numbers(value: Any) -> bool:
    return all(_numbers(one) for one in value) if isinstance(value, list) else isinstance(value, float)
