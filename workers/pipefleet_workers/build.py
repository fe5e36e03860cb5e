"""Puts a worker together: model, warm-up, engine, and the consumer that feeds it. `worker` calls `build`.

It imports torch, so it is itself imported late. A model that cannot be served raises ModelError; a metrics port in use raises
UsageError.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from pipefleet import __version__
from pipefleet.connection.clock import ServerClock
from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobItem, JobMessage, Priority, Shard, as_id, decode_message
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import StorageRef, join_uri
from pipefleet.errors import ContractError, PipefleetError, UsageError
from pipefleet.fleet.latest import LatestFleet
from pipefleet.fleet.pools import Pool
from pipefleet.fleet.routing import revision_queue
from pipefleet.fleet.writers import writers
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import celery_message
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.consume.burials import Burials
from pipefleet_workers.consume.consumer import Consumer
from pipefleet_workers.consume.elsewhere import Elsewhere
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.jobs import Jobs, Outlets
from pipefleet_workers.consume.places import Others, Places
from pipefleet_workers.consume.shards import Shards
from pipefleet_workers.consume.suspects import Journal, Suspects
from pipefleet_workers.consume.tally import Tally
from pipefleet_workers.consume.tries import IntakeLimits
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.engine.processes import PreprocessPool
from pipefleet_workers.facts import Facts
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.models.acceleration import accelerated
from pipefleet_workers.models.continuous import begin_continuous
from pipefleet_workers.models.lanes import lanes_of
from pipefleet_workers.models.load import load_pipeline
from pipefleet_workers.models.precision import how_loaded
from pipefleet_workers.models.warmup import WarmUp, warm_up
from pipefleet_workers.observe.gpus import visible_gpus, watch_gpus
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.pulse import Pulse
from pipefleet_workers.observe.stage_trace import Tracer
from pipefleet_workers.process.exit_codes import HUNG_FORWARD
from pipefleet_workers.process.watchdog import watched
from pipefleet_workers.results.lines import PartWriter, ResultWriter
from pipefleet_workers.results.reports import Reporter
from pipefleet_workers.results.text_streams import TextStreams
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from pipefleet_workers.storage.uri_gate import allowed_prefixes

log = logging.getLogger(__name__)
MOST_NAME = 100
"""Characters of an item's id in the name of its own result; the key fits wherever the run's keys fit."""


@dataclass(frozen=True, slots=True)
class Built:
    """A worker that is not connected to its queue yet."""

    consumer: Consumer
    reporter: Reporter
    facts: Facts
    burials: Burials
    clock: ServerClock
    """The Redis server's clock, already measured."""
    letters: bool
    """Whether the transport keeps dead letters; `bury` then hears of refused shards."""

    def bury(self, letter: dead_letters.DeadLetter) -> None:
        """Tell the waiting client that the job of a dead letter has failed.

        Raises ServiceUnavailableError; then the caller repeats it.
        """
        self.burials.letter(letter)

    def refused(self, payload: Any, reason: str) -> None:
        """Tell the waiting client that its job was refused, if the message names a job."""
        if self.letters and dead_letters.kills(reason):
            return  # the dead letter tells the client, as for any job that kills its workers
        try:
            message, failure = decode_message(payload), JobFailure("refused", reason, "consume")
            if message.shard is None:
                self.reporter.fail(message, failure)
            elif not self.letters:
                self.burials.shard(message.shard, failure)
        except ContractError:
            return  # the message is no job, so no client waits for it
        except PipefleetError as error:
            log.warning("a refused job cannot be reported: %s", error)


def build(
    pool: Pool,
    settings: Settings,
    worker_settings: WorkerSettings,
    *,
    queue: str,
    device: str | None,
    name: str,
    fleet_file: LatestFleet | None = None,
) -> Built:
    """The consumer of one pool, with its model loaded and warm and its engine running; and the results of the warm-up.

    `queue` is the pool's queue. Jobs of other revisions that come through it go to the queue that `fleet_file` or a live worker
    names. Raises ModelError, or UsageError when the metrics port is in use.
    """
    row = RUNTIME[pool.task]
    instruments = _instruments(pool, worker_settings)
    pipe = load_pipeline(pool, device=device)
    _watch_gpus(instruments.metrics, pool, pipe)
    default = row.sizing.cpu_cost if pipe.device.type == "cpu" else row.sizing.gpu_cost
    parameters = {**row.example_parameters, **pool.parameters}
    adapter = accelerated(row.adapter(pipe), pool, parameters, worker_settings, max_cost=default)
    with watched("warm-up", worker_settings.forward_timeout, HUNG_FORWARD, instruments.on_fatal):
        found = _warmed(adapter, pool, parameters, worker_settings, instruments, default)
        found = replace(found, continuous=begin_continuous(adapter, pool, parameters, worker_settings))
    limits = BatchLimits(pool.max_batch_cost or found.max_cost, pool.max_batch_items)
    tally = Tally(instruments.metrics, instruments.work)
    loaded = how_loaded(pipe)
    outlets = _outlets(pool, settings, worker_settings, name, tally, loaded)
    stages = _stages(pool, settings, worker_settings, outlets.store, adapter)
    engine = Engine(stages, limits, worker_settings, instruments, slice_items=row.sizing.slice_items, lanes=found.lanes)
    engine.start()
    log.info("pool %s serves %s with %s: %s", pool.name, pool.task, pool.model, loaded)
    clock = _clock(settings)
    elsewhere = Elsewhere(settings, fleet_file)
    health = Health(_probe(outlets))
    jobs = Jobs(pool, engine, outlets.allowed, elsewhere, store=settings.store, clock=clock.now, is_away=health.is_away)
    own_queue = revision_queue(queue, pool.model, pool.revision)
    undertaker = Undertaker(settings, queue, pool.name, name)
    # Without leases a message cannot be put off: it would come back at once.
    lease = worker_settings.transport != "stock"
    places = Places(Others(settings, own_queue, name)) if lease else Places()
    outlets.store.report_refusals(on_denied=health.accuse, on_refused=places.require)
    consumer = _consumer(jobs, outlets, worker_settings, health, undertaker=undertaker, tally=tally, places=places)
    health.watchers.append(instruments.metrics.barred)
    facts = Facts(name, pool, limits, found, instruments, Pulse(instruments.metrics), own_queue, health, places, loaded)
    burials = Burials(settings, outlets.reporter, queue=queue, allowed=outlets.allowed, on_refused=tally.refused)
    return Built(consumer, outlets.reporter, facts, burials, clock, letters=worker_settings.transport != "stock")


def _stages(
    pool: Pool, settings: Settings, worker_settings: WorkerSettings, store: WorkerStore, adapter: Adapter
) -> Stages:
    processes = PreprocessPool.of(pool.task, adapter, worker_settings) if worker_settings.preprocess_processes else None
    decoder = Decoder(task_spec(pool.task), worker_settings, sampling_rate=adapter.sampling_rate)
    writes = type(adapter).text_so_far is not Adapter.text_so_far
    streams = TextStreams(connect(settings), adapter.text_so_far) if writes else None
    results = ResultWriter(store, settings.store)
    return Stages(Fetcher(store, worker_settings), decoder, adapter, processes, results, streams)


def _instruments(pool: Pool, worker_settings: WorkerSettings) -> Instruments:
    """The observers of a worker; its trace is written and its metrics are served from now on."""
    instruments = Instruments(Metrics(pool.name), tracer=Tracer(worker_settings.trace))
    instruments.tracer.start()
    _serve_metrics(instruments.metrics, worker_settings)
    return instruments


def _watch_gpus(metrics: Metrics, pool: Pool, pipe: Any) -> None:
    if pipe.device.type == "cuda":
        watch_gpus(metrics, pool.name, visible_gpus(every=pool.device_map is not None, index=pipe.device.index))


class Undertaker:
    """Moves single items of shards to the dead letters, and keeps the journals of shards that kill workers. Thread-safe."""

    def __init__(self, settings: Settings, queue: str, pool: str, worker: str) -> None:
        self._settings = settings
        self._queue = queue
        self._pool = pool
        self._worker = worker
        self._redis = connect(settings)
        self._clock = ServerClock(self._redis)

    def written_elsewhere(self, format: str) -> bool:
        """Whether another live worker of the pool can write parts in a format."""
        with redis_errors(self._settings.redis_url):
            return writers(self._redis, self._pool, format, but=self._worker)[1] > 0

    def journal(self, shard: Shard) -> Journal:
        """The journal of a shard."""
        return Journal(self._redis, self._settings, shard)

    def bury(self, reason: str, message: JobMessage, position: int, item: JobItem) -> None:
        """Write a dead letter for one item: a job of this item alone, whose result lies beside the results of its run.

        Two items of a shard may have one id, so the job's name includes the `position` in the shard. An item that no message can
        carry, such as a long text, gets no letter.
        """
        assert message.shard is not None
        name = as_id(f"{message.id}-{item.id}", most=190)
        file = f"{quote(name, safe='')[:MOST_NAME]}-{position}.json"
        alone = JobMessage(
            f"{name}-{position}",
            message.task,
            message.model,
            message.revision,
            message.parameters,
            items=(item,),
            output=RunLayout(message.shard.run_uri).requeued + file,
        )
        try:
            with redis_errors(self._settings.redis_url):
                text = celery_message(alone, self._queue, Priority.LOW, now=self._clock.now())
        except ContractError as error:  # no message can carry the item; its row in the part says that it failed
            log.warning("item %d of shard %d has no dead letter: %s", position, message.shard.index, error)
            return
        with redis_errors(self._settings.redis_url):
            dead_letters.file_dead_letter(self._redis, self._queue, message=text, reason=reason)


def _consumer(
    jobs: Jobs,
    outlets: Outlets,
    worker_settings: WorkerSettings,
    health: Health,
    *,
    undertaker: Undertaker,
    tally: Tally,
    places: Places,
) -> Consumer:
    shards = Shards(jobs, outlets, tally, elsewhere=undertaker.written_elsewhere)
    suspects = Suspects(jobs, shards, undertaker.journal, undertaker.bury)
    limits = IntakeLimits(
        shards=worker_settings.shards, deliveries=worker_settings.max_deliveries, retries=worker_settings.retries
    )
    return Consumer(jobs, shards, suspects, outlets.reporter, health, tally=tally, limits=limits, places=places)


def _clock(settings: Settings) -> ServerClock:
    """The Redis server's clock, measured: from now on it gives the time during outages too."""
    clock = ServerClock(connect(settings))
    with redis_errors(settings.redis_url):
        clock.now()
    return clock


def _probe(outlets: Outlets) -> Any:
    """A probe for `Health`: it asks Redis, and writes and reads a small object under the prefix of results, as jobs do."""
    quick = WorkerStore(retries=0, retry_seconds=5.0)
    uri = join_uri(outlets.reporter.store_uri, "probe")

    def probe() -> None:
        outlets.reporter.ping()
        quick.put(uri, b"pipefleet\n", content_type="text/plain")
        quick.get(StorageRef(uri))

    return probe


def _warmed(
    adapter: Adapter,
    pool: Pool,
    parameters: dict[str, Any],
    worker_settings: WorkerSettings,
    instruments: Instruments,
    default: int,
) -> WarmUp:
    if not worker_settings.warm_up:
        return WarmUp(adapter.pads, 0.0, 0.0, default, 0.0, lanes=lanes_of(adapter.pipe.device))
    lanes = _asked_lanes(pool, worker_settings)
    return warm_up(adapter, task_spec(pool.task), parameters, instruments.fit, default, lanes=lanes)


def _asked_lanes(pool: Pool, worker_settings: WorkerSettings) -> int:
    """The lanes of the settings. A compiled model, a model on several GPUs and a simulated device run one batch at a time."""
    alone = pool.compile or pool.device_map is not None or worker_settings.simulated_device
    if alone and worker_settings.lanes > 1:
        log.warning("1 lane instead of %d: the model is compiled, spread over GPUs or simulated", worker_settings.lanes)
    return 1 if alone else worker_settings.lanes


def _outlets(
    pool: Pool,
    settings: Settings,
    worker_settings: WorkerSettings,
    name: str,
    tally: Tally,
    loaded: Mapping[str, str],
) -> Outlets:
    store = WorkerStore()
    pinned = {"revision": pool.revision} if pool.revision else {}
    provenance = {"model": pool.model, **pinned, "worker": name, "pipefleet": __version__, **loaded}
    reporter = Reporter(connect(settings), store, settings, worker=name, on_failed=tally.failed, loaded=loaded)
    return Outlets(store, ObjectStore(), PartWriter(store, provenance), reporter, allowed_prefixes(worker_settings))


def _serve_metrics(metrics: Metrics, worker_settings: WorkerSettings) -> None:
    if not worker_settings.metrics_port:
        return
    try:
        metrics.serve(worker_settings.metrics_port, worker_settings.metrics_address)
    except OSError as error:
        raise UsageError(
            f"cannot serve metrics on {worker_settings.metrics_address}:{worker_settings.metrics_port} "
            f"({error.strerror}); choose another PIPEFLEET_WORKER_METRICS_PORT"
        ) from None
