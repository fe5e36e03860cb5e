"""The worker process: builds its pool's worker, and runs Celery's consumer on its queue until it is told to stop.

    connect to Redis ─▶ join the fleet ─▶ build (model, engine, consumer) ─▶ announce ─▶ Celery consumes ─▶ drain ─▶ withdraw

`pipefleet worker` calls `Worker.run`, which returns an exit code. Before it consumes, it may raise ModelError or
ServiceUnavailableError.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipefleet.connection.connect import connect, subscribed
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.messages import TASK_NAME
from pipefleet.errors import FleetMismatchError, ObjectMissingError, PipefleetError, ServiceUnavailableError
from pipefleet.fleet.announcements import announce_pool, forget_dead_workers, takes_new_work, withdraw_pool
from pipefleet.fleet.identity import Membership
from pipefleet.fleet.latest import LatestFleet
from pipefleet.fleet.pools import Fleet, Pool
from pipefleet.fleet.revisions import forget_revisions
from pipefleet.fleet.routing import announcement, queue_name, revision_queue
from pipefleet.queues import dead_letters
from pipefleet.queues.celery import celery_app
from pipefleet.queues.keys import CANCELLED_CHANNEL
from pipefleet.queues.revision_notes import note_revision
from pipefleet.service import Service, Services
from pipefleet.settings import Settings
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.delivery.redis_start import connect_patiently
from pipefleet_workers.observe import logs, opentelemetry
from pipefleet_workers.process import memory
from pipefleet_workers.process.ready_file import claim
from pipefleet_workers.settings import WorkerSettings

if TYPE_CHECKING:
    from pipefleet.connection.clock import ServerClock
    from pipefleet_workers.build import Built
    from pipefleet_workers.consume.consumer import Consumer
    from pipefleet_workers.facts import Facts

log = logging.getLogger(__name__)
LAST_SECONDS = 1.0
"""How long the threads of a worker that has drained may take to end; they are daemons, and one may wait for a service."""


def prepare_process(*, threads: int | None) -> None:
    """Settings that must be made before torch is imported.

    OpenMP threads that spin while they wait are very slow on shared cores: MiniLM ran at a third of its speed beside one busy
    loop, until its threads were told to sleep.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


class Worker:
    """One worker process, called `name` in the fleet. `run` blocks until SIGTERM or SIGINT and returns an exit code.

    `fleet_file` is the source of `fleet`; later it shows which other revisions belong to the fleet.
    """

    def __init__(
        self,
        fleet: Fleet,
        pool: Pool,
        settings: Settings,
        worker_settings: WorkerSettings,
        fleet_file: LatestFleet | None = None,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._worker_settings = worker_settings
        self._queue = queue_name(pool, fleet)
        self._revision_queue = revision_queue(self._queue, pool.model, pool.revision)
        self._announcement = announcement(pool, fleet)
        self._fleet_file = fleet_file
        self.name = f"{pool.name}@{socket.gethostname()}-{os.getpid()}"
        self._stopping = threading.Event()
        self._membership = Membership(connect(settings), ObjectStore(), settings)
        self._refused: FleetMismatchError | None = None

    def run(self, *, device: str | None = None, ready_file: Path | None = None) -> int:
        """Load the model and consume until told to stop. Raises ModelError or ServiceUnavailableError before it begins."""
        from pipefleet_workers.build import build

        logs.adopt_transformers()
        if ready_file is not None:
            claim(ready_file)
        connect_patiently(self._settings, self._worker_settings)
        self._join_fleet()
        built = build(
            self._pool,
            self._settings,
            self._worker_settings,
            queue=self._queue,
            device=device,
            name=self.name,
            fleet_file=self._fleet_file,
        )
        task = self._task(built)
        app = celery_app(
            self._settings, queue=self._queue, revision_queue=self._revision_queue, **self._transport(built, task)
        )
        self._register(app, task, built)
        self._connect_signals(ready_file)
        built.consumer.start()
        services = self._services(built)
        opentelemetry.start(self._pool.name, self.name)
        redis = connect_patiently(self._settings, self._worker_settings)  # again, since loading a model takes long
        with redis_errors(self._settings.redis_url):
            forget_revisions(redis)
            forget_dead_workers(redis)
        services.start()
        worker = self._celery_worker(app)
        worker.start()
        services.stop(LAST_SECONDS)  # or it could announce this worker once more
        built.burials.stop(LAST_SECONDS)
        built.consumer.stop(LAST_SECONDS)
        self._withdraw(built.facts)
        opentelemetry.stop()
        if self._refused is not None:
            raise self._refused
        return int(worker.exitcode or 0)

    def _celery_worker(self, app: Any) -> Any:
        return app.Worker(
            pool="solo",  # never used: the task's Strategy hands messages to the consumer
            concurrency=1,
            prefetch_multiplier=self._worker_settings.prefetch,
            hostname=self.name,
            loglevel="WARNING",
            without_gossip=True,
            without_mingle=True,
            task_events=True,
            quiet=True,
        )

    def _services(self, built: Built) -> Services:
        """The services beside the consumer. One event ends them all: Celery's handler of SIGTERM sets it, and may take no lock."""
        told = self._stopping.set
        return Services(
            # Who is refused should say so before the first job; a store that hangs must not keep the others waiting.
            Service("first-look", lambda _: built.consumer.health.check()),
            Service("announce", lambda _: self._announce(built.facts, built.clock), wake=told),
            Service("fleet", lambda _: self._stay_in_fleet(), wake=told),
            Service("cancels", lambda _: self._listen_for_cancels(built.consumer), wake=told),
        )

    def _join_fleet(self) -> None:
        """Raise FleetMismatchError if Redis belongs to another fleet; while S3 is away, the check is repeated later."""
        try:
            log.info("%s", self._membership.prove(works=True))
        except (ServiceUnavailableError, ObjectMissingError) as error:
            log.warning("the store of the fleet is not compared yet: %s", error)

    def _stay_in_fleet(self) -> None:
        """Check now and then whether Redis still belongs to this worker's fleet; if it does not, drain and end with code 2."""
        while not self._stopping.wait(self._worker_settings.announce_seconds):
            try:
                if self._membership.changed():
                    self._join_fleet()
            except FleetMismatchError as error:
                log.critical("this worker drains: %s", error)
                self._refused = error
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except PipefleetError as error:
                log.debug("cannot ask whose Redis it is: %s", error)
            except Exception:
                log.exception("asking whose Redis it is failed")

    def _transport(self, built: Built, task: Any) -> dict[str, Any]:
        """Celery's options for the transport: ours, or Celery's own, which restores a dead worker's jobs after an hour."""
        if self._worker_settings.transport == "stock":
            log.warning("the stock transport: a killed worker's jobs come back after an hour, and some are lost")
            return {}

        def dead(letter: dead_letters.DeadLetter) -> None:
            built.bury(letter)
            # Celery hears of other letters from the worker that refused the job.
            if letter.job_id is not None and letter.code == "killed_worker":
                task.died(letter.job_id, letter.reason)

        options = {
            "lease_seconds": self._worker_settings.lease_seconds,
            "max_deliveries": self._worker_settings.max_deliveries,
            "low_prefetch": self._worker_settings.shards,
            "only_tasks": [TASK_NAME],
            "on_dead": dead,
        }
        return {"transport": "pipefleet_workers.delivery.transport:Transport", "options": options}

    def _task(self, built: Built) -> Any:
        """The Celery task that takes messages."""
        from pipefleet_workers.consume.celery_task import InferTask

        members = {"name": TASK_NAME, "consumer": built.consumer, "refused": staticmethod(built.refused)}
        members["clock"] = staticmethod(built.clock.peek)
        return type("Infer", (InferTask,), members)()

    def _register(self, app: Any, task: Any, built: Built) -> None:
        from pipefleet_workers.consume import control
        from pipefleet_workers.consume.celery_task import drain_step, register_alone
        from pipefleet_workers.delivery.envelope import refuse_compression

        refuse_compression()
        register_alone(app, task)
        control.install()
        app.steps["consumer"].add(drain_step(built.consumer, self._worker_settings.drain_seconds))

    def _connect_signals(self, ready_file: Path | None) -> None:
        from celery import signals

        def ready(**_: Any) -> None:
            memory.settle()
            log.info("ready: queue %s", self._revision_queue)
            if ready_file is not None:
                ready_file.write_text(f"{os.getpid()}\n")

        signals.worker_ready.connect(ready, weak=False)

        def shutting_down(**_: Any) -> None:
            self._stopping.set()
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)

        signals.worker_shutting_down.connect(shutting_down, weak=False)
        # Otherwise Celery changes the root logger's level, and turns all printed text into log records.
        signals.setup_logging.connect(lambda **_: None, weak=False)

    def _announce(self, facts: Facts, clock: ServerClock) -> None:
        """Announce to producers without a fleet file what this worker serves, again and again while it lives."""
        redis, seconds = connect(self._settings), self._worker_settings.announce_seconds
        while not self._stopping.is_set():
            try:
                with redis_errors(self._settings.redis_url):
                    announce_pool(redis, self._pool.name, self._announced(redis), seconds=3 * seconds)
                    now = clock.now()  # this call also measures the clock, for code that only reads its last value
                    note_revision(redis, self._revision_queue, self._pool.model, self._pool.revision, now=now)
                    facts.announce(redis, seconds=3 * seconds)
            except PipefleetError as error:
                log.warning("cannot announce the pool: %s", error)
            except Exception:  # otherwise the worker would look dead while it works
                log.exception("cannot announce the pool")
            self._stopping.wait(seconds)

    def _announced(self, redis: Any) -> dict[str, Any]:
        """The present announcement: the fleet file may have changed which revision new work goes to.

        New work still comes here until another worker, or a scaler, announces that revision: a model may take long to load.
        """
        pool = None if self._fleet_file is None else self._fleet_file.fleet().pools.get(self._pool.name)
        if pool is None or pool.task != self._pool.task:
            return self._announcement
        if (pool.model, pool.revision) == (self._pool.model, self._pool.revision):
            return self._announcement | {"retired": False}
        return self._announcement | {"retired": self._announcement["retired"] or takes_new_work(redis, pool)}

    def _withdraw(self, facts: Facts) -> None:
        """Announce that this worker has ended, and its last work."""
        try:
            with redis_errors(self._settings.redis_url):
                redis = connect(self._settings)
                facts.withdraw(redis)
                withdraw_pool(redis, self._pool.name, self._announcement)
        except PipefleetError as error:
            log.warning("cannot sign off: %s", error)

    def _listen_for_cancels(self, consumer: Consumer) -> None:
        """Tell the consumer which jobs and runs are cancelled; goes on after an error."""
        redis = connect(self._settings)
        while not self._stopping.is_set():
            try:
                with (
                    redis_errors(self._settings.redis_url),
                    subscribed(redis, CANCELLED_CHANNEL) as channel,
                ):
                    while not self._stopping.is_set():
                        message = channel.get_message(ignore_subscribe_messages=True, timeout=0.25)
                        if message is not None:
                            consumer.cancel(message["data"].decode(errors="replace"))
            except PipefleetError as error:
                log.warning("does not hear which jobs are cancelled: %s", error)
                self._stopping.wait(1.0)  # cancelled jobs are also found when they start and before they are written
            except Exception:
                log.exception("hearing which jobs are cancelled failed")
                self._stopping.wait(1.0)
