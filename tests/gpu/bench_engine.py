"""pipefleet's engine as a worker builds it (load, accelerate, warm up), fed with items in memory. No queue, no store.

The benchmark runs it against loops by hand; the checks of lanes and of continuous batching run it too.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pipefleet.contract.messages import JobItem, Priority
from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Blob, JobContext, Work
from pipefleet_workers.models.acceleration import accelerated
from pipefleet_workers.models.continuous import begin_continuous
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore

SHARD = 512


class InProcess:
    """A started engine around a loaded pipeline. `pool` has its settings, among them the parameters of every job."""

    def __init__(self, pipe: Any, pool: Pool, settings: WorkerSettings) -> None:
        row, spec, instruments = RUNTIME[pool.task], task_spec(pool.task), Instruments(Metrics("gpu"))
        default = row.sizing.cpu_cost if pipe.device.type == "cpu" else row.sizing.gpu_cost
        parameters = {**row.example_parameters, **pool.parameters}
        adapter = accelerated(row.adapter(pipe), pool, parameters, settings, max_cost=default)
        self.found = warm_up(adapter, spec, parameters, instruments.fit, default, lanes=settings.lanes)
        self.joins = begin_continuous(adapter, pool, parameters, settings)
        """Whether requests join and leave at every step: the settings ask for it, and the model has passed the proof."""
        self._pool = pool
        limits = BatchLimits(pool.max_batch_cost or self.found.max_cost, pool.max_batch_items)
        decoder = Decoder(spec, settings, sampling_rate=adapter.sampling_rate)
        stages = Stages(Fetcher(WorkerStore(), settings), decoder, adapter)
        slice_items, lanes = row.sizing.slice_items, self.found.lanes
        self._engine = Engine(stages, limits, settings, instruments, slice_items=slice_items, lanes=lanes)
        self._engine.start()

    def run(self, items: Sequence[Any], parameters: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The output of each item, admitted in shards as the consumer admits them. Raises RuntimeError for a failed item."""
        starts = range(0, len(items), SHARD)
        shards = [self._shard(items[at : at + SHARD], parameters[at : at + SHARD]) for at in starts]
        feeder = threading.Thread(target=self._admit, args=(shards,), daemon=True)
        feeder.start()
        outputs = [_output(outcome) for _, sink in shards for outcome in _all(sink)]
        feeder.join()
        return outputs

    def stop(self) -> None:
        """End the engine's threads."""
        self._engine.stop(60.0)

    def _admit(self, shards: Sequence[tuple[list[Work], Outcomes]]) -> None:
        for works, _ in shards:
            self._engine.admit(works, bulk=True)

    def _shard(self, items: Sequence[Any], parameters: Sequence[Mapping[str, Any]]) -> tuple[list[Work], Outcomes]:
        sink = Outcomes(range(len(items)))
        context = JobContext("gpu", None, dict(self._pool.parameters), int(Priority.LOW), None, sink)
        works = []
        for position, (one, own) in enumerate(zip(items, parameters, strict=True)):
            inputs = one if isinstance(one, str) else Blob(f"s3://gpu/{position}", one, None)
            merged = {**self._pool.parameters, **own}
            works.append(Work(context, position, JobItem(str(position), inputs), merged, len(one), fetches=False))
        return works, sink


def _all(sink: Outcomes) -> list[Any]:
    while not sink.complete:
        sink.wait(1.0)
    return list(sink.in_order())


def _output(outcome: Any) -> Any:
    if outcome.failure is not None:
        raise RuntimeError(f"item {outcome.work.item.id} failed: {outcome.failure.message}")
    return outcome.output
