"""pipefleet's engine in this process, fed with the bytes of the items as if they had been fetched already."""

from __future__ import annotations

import functools
import threading
from typing import Any

from pipefleet.contract.messages import JobItem, Priority
from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.vision.on_device import on_device
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Blob, JobContext, Work
from pipefleet_workers.models.linears import faster_linears
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.stage_trace import Tracer
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.benchmarks.workloads import Workload

SHARD = 512


def through_the_engine(pipe: Any, workload: Workload) -> list[Any]:
    """The outputs of all items, admitted shard by shard as the consumer does. Raises RuntimeError for a failed item.

    The engine is started, with the worker's own warm-up, by the first call for a pipeline, and stays.
    """
    engine, shards = _engine(pipe, workload.task), _shards(workload)
    feeder = threading.Thread(target=_admit, args=(engine, shards), daemon=True)
    feeder.start()
    outputs: list[Any] = []
    for _, sink in shards:
        while not sink.complete:
            sink.wait(1.0)
        outputs += [_output(outcome) for outcome in sink.in_order()]
    feeder.join()
    return outputs


def _admit(engine: Engine, shards: list[tuple[list[Work], Outcomes]]) -> None:
    for works, _ in shards:
        engine.admit(works, bulk=True)


@functools.lru_cache(maxsize=1)
def _engine(pipe: Any, task: str) -> Engine:
    row, spec, settings = RUNTIME[task], task_spec(task), WorkerSettings()
    instruments = Instruments(Metrics("bench"), tracer=Tracer(""))
    adapter = row.adapter(pipe)
    if pipe.device.type == "cuda":
        adapter = on_device(adapter)
    if settings.onednn == "auto":
        faster_linears(pipe.model)
    default = row.sizing.cpu_cost if pipe.device.type == "cpu" else row.sizing.gpu_cost
    found = warm_up(adapter, spec, {}, instruments.fit, default, lanes=settings.lanes)
    print(f"  {found.describe()}", flush=True)
    limits = BatchLimits(found.max_cost, Pool("bench", task, "").max_batch_items)
    decoder = Decoder(spec, settings, sampling_rate=adapter.sampling_rate)
    stages = Stages(Fetcher(WorkerStore(), settings), decoder, adapter)
    engine = Engine(stages, limits, settings, instruments, slice_items=row.sizing.slice_items, lanes=found.lanes)
    engine.start()
    return engine


def _shards(workload: Workload) -> list[tuple[list[Work], Outcomes]]:
    names = list(workload.items)
    return [_shard(workload, names[start : start + SHARD]) for start in range(0, len(names), SHARD)]


def _shard(workload: Workload, names: list[str]) -> tuple[list[Work], Outcomes]:
    sink = Outcomes(range(len(names)))
    parameters = {**workload.parameters, **workload.pool_parameters}
    context = JobContext(names[0], None, parameters, int(Priority.LOW), None, sink)
    works = []
    for position, name in enumerate(names):
        content = workload.items[name]
        inputs = content if isinstance(content, str) else Blob(f"s3://pipefleet/{name}", content, None)
        works.append(Work(context, position, JobItem(name, inputs), parameters, len(content), fetches=False))
    return works, sink


def _output(outcome: Any) -> Any:
    if outcome.failure is not None:
        raise RuntimeError(f"item {outcome.work.item.id} failed: {outcome.failure.message}")
    return outcome.output
