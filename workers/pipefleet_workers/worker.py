"""The worker process: loads its pool's model, builds the engine, and runs Celery's consumer until told to stop."""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefleet import __version__, broker
from pipefleet.contract import TASK_NAME
from pipefleet.errors import ContractError, PipefleetError, ServiceUnavailableError, UsageError
from pipefleet.fleet import Fleet, Pool
from pipefleet.objects import ObjectStore
from pipefleet.patience import pause
from pipefleet.routing import queue_name
from pipefleet.settings import Settings
from pipefleet.tasks import task_spec
from pipefleet_workers.batcher import BatchLimits
from pipefleet_workers.facts import Facts
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.simulated import ServiceTime, SimulatedDevice

if TYPE_CHECKING:
    from pipefleet_workers.consumer import Consumer, Outlets
    from pipefleet_workers.device import Instruments
    from pipefleet_workers.engine import Stages
    from pipefleet_workers.metrics import Metrics
    from pipefleet_workers.warmup import WarmUp

log = logging.getLogger(__name__)
RETRY_FIRST, RETRY_LONGEST = 4.0, 60.0
"""Seconds before a job whose service was away is tried again: at most these, at least half, doubled each time."""


def prepare_process(*, threads: int | None) -> None:
    """Settings that must be made before torch is imported.

    OpenMP threads that spin while they wait collapse when the cores are shared: MiniLM ran at a third of its speed beside one
    busy loop until they were told to sleep.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def build_consumer(
    pool: Pool, settings: Settings, worker_settings: WorkerSettings, *, device: str | None, name: str
) -> tuple[Consumer, Facts]:
    """The consumer of one pool, its model loaded and warm, its engine running; and what was found out about batching.

    Raises ModelError, or UsageError when the metrics port is in use.
    """
    from pipefleet_workers.consumer import Consumer
    from pipefleet_workers.device import Instruments
    from pipefleet_workers.engine import Engine
    from pipefleet_workers.metrics import Metrics
    from pipefleet_workers.models import load_pipeline
    from pipefleet_workers.runtime import RUNTIME
    from pipefleet_workers.tracing import Tracer

    row = RUNTIME[pool.task]
    instruments = Instruments(Metrics(pool.name), tracer=Tracer(worker_settings.trace))
    _serve_metrics(instruments.metrics, worker_settings)
    pipe = load_pipeline(pool, device=device)
    adapter: Any = row.adapter(pipe)
    default = row.sizing.cpu_cost if pipe.device.type == "cpu" else row.sizing.gpu_cost
    found = _warmed(adapter, pool, worker_settings, instruments, default)
    if worker_settings.simulated_device:
        adapter = SimulatedDevice(adapter, ServiceTime.parse(worker_settings.simulated_device))
    limits = BatchLimits(pool.max_batch_cost or found.max_cost, pool.max_batch_items)
    stages, outlets = _stages(adapter, pool, settings, worker_settings, name)
    engine = Engine(stages, limits, worker_settings, instruments, slice_items=row.sizing.slice_items)
    engine.start()
    log.info("pool %s serves %s with %s on %s", pool.name, pool.task, pool.model, pipe.device)
    return Consumer(pool, engine, outlets), Facts(name, pool, limits, found, instruments)


def _warmed(
    adapter: Any, pool: Pool, worker_settings: WorkerSettings, instruments: Instruments, default: int
) -> WarmUp:
    from pipefleet_workers.runtime import RUNTIME
    from pipefleet_workers.warmup import WarmUp, warm_up

    if not worker_settings.warm_up:
        return WarmUp(adapter.pads, 0.0, 0.0, default, 0.0)
    parameters = {**RUNTIME[pool.task].example_parameters, **pool.parameters}
    return warm_up(adapter, task_spec(pool.task), parameters, instruments.fit, default)


def _stages(
    adapter: Any, pool: Pool, settings: Settings, worker_settings: WorkerSettings, name: str
) -> tuple[Stages, Outlets]:
    from pipefleet_workers.consumer import Outlets
    from pipefleet_workers.engine import Stages
    from pipefleet_workers.objects import WorkerStore
    from pipefleet_workers.reports import Reporter
    from pipefleet_workers.stages.decode import Decoder
    from pipefleet_workers.stages.fetch import Fetcher, allowed_prefixes
    from pipefleet_workers.stages.write import PartWriter

    store = WorkerStore()
    decoder = Decoder(task_spec(pool.task), worker_settings, sampling_rate=adapter.sampling_rate)
    pinned = {"revision": pool.revision} if pool.revision else {}
    provenance = {"model": pool.model, **pinned, "worker": name, "pipefleet": __version__}
    reporter = Reporter(broker.connect(settings), store, settings, worker=name)
    outlets = Outlets(store, ObjectStore(), PartWriter(store, provenance), reporter, allowed_prefixes(worker_settings))
    return Stages(Fetcher(store, worker_settings), decoder, adapter), outlets


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


class Worker:
    """One worker process. `run` blocks until SIGTERM or SIGINT and returns an exit code."""

    def __init__(self, fleet: Fleet, pool: Pool, settings: Settings, worker_settings: WorkerSettings) -> None:
        self._pool = pool
        self._settings = settings
        self._worker_settings = worker_settings
        self._queue = queue_name(pool, fleet)
        self._announcement = pool.to_json() | {"default": self._queue.count(".") == 1, "queue": self._queue}
        self._name = f"{pool.name}@{socket.gethostname()}-{os.getpid()}"
        self._stopping = threading.Event()
        self._app = broker.celery_app(settings, queue=self._queue)

    def run(self, *, device: str | None = None, ready_file: Path | None = None) -> int:
        """Load the model, consume until told to stop. Raises ModelError or ServiceUnavailableError before it begins."""
        with broker.redis_errors(self._settings.redis_url):
            broker.connect(self._settings).ping()
        consumer, facts = build_consumer(
            self._pool, self._settings, self._worker_settings, device=device, name=self._name
        )
        self._register(consumer)
        self._connect_signals(consumer, ready_file)
        for target in (lambda: self._announce(facts), lambda: self._listen_for_cancels(consumer)):
            threading.Thread(target=target, daemon=True).start()
        worker = self._app.Worker(
            pool="threads",
            concurrency=self._worker_settings.concurrency,
            hostname=self._name,
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            task_events=True,
            quiet=True,
        )
        worker.start()
        return int(worker.exitcode or 0)

    def _register(self, consumer: Any) -> None:
        from celery.exceptions import Reject

        from pipefleet_workers.consumer import DrainedError

        @self._app.task(name=TASK_NAME, bind=True, max_retries=None, acks_late=True)  # type: ignore[untyped-decorator]
        def infer(task: Any, payload: Any) -> str:
            try:
                return str(consumer.handle(payload))
            except DrainedError:
                raise Reject("the worker shuts down", requeue=True) from None
            except ServiceUnavailableError as error:
                countdown = pause(task.request.retries, first=RETRY_FIRST, longest=RETRY_LONGEST)
                raise task.retry(exc=error, countdown=countdown) from None
            except ContractError as error:
                log.error("refused a message: %s", error)
                raise

    def _connect_signals(self, consumer: Any, ready_file: Path | None) -> None:
        from celery import signals

        def ready(**_: Any) -> None:
            log.info("ready: queue %s", self._queue)
            if ready_file is not None:
                ready_file.write_text(f"{os.getpid()}\n")

        def shutting_down(**_: Any) -> None:
            self._stopping.set()
            seconds = self._worker_settings.drain_seconds
            threading.Thread(target=consumer.drain, args=(seconds,), daemon=True).start()

        signals.worker_ready.connect(ready, weak=False)
        signals.worker_shutting_down.connect(shutting_down, weak=False)

    def _announce(self, facts: Facts) -> None:
        """Tell producers without a fleet file what is served here, again and again while this worker lives."""
        redis, seconds = broker.connect(self._settings), self._worker_settings.announce_seconds
        while not self._stopping.is_set():
            try:
                with broker.redis_errors(self._settings.redis_url):
                    broker.announce_pool(redis, self._pool.name, self._announcement, seconds=3 * seconds)
                    facts.announce(redis, seconds=3 * seconds)
            except PipefleetError as error:
                log.warning("cannot announce the pool: %s", error)
            self._stopping.wait(seconds)

    def _listen_for_cancels(self, consumer: Any) -> None:
        redis = broker.connect(self._settings)
        while not self._stopping.is_set():
            try:
                with (
                    broker.redis_errors(self._settings.redis_url),
                    broker.subscribed(redis, broker.CANCELLED_CHANNEL) as channel,
                ):
                    while not self._stopping.is_set():
                        message = channel.get_message(ignore_subscribe_messages=True, timeout=1.0)
                        if message is not None:
                            consumer.cancel(message["data"].decode())
            except PipefleetError:
                self._stopping.wait(1.0)  # cancelled jobs are also told when they start and before they are written
