"""The device: takes batches from the room before it, runs them, and hands complete items on. One thread touches the model.

    room ─▶ schedule ─▶ execute ─▶ update ─▶ on_complete: items whose units have all ended
                                     ▲
    units of stopped jobs ──────────┘  aborted: found by `_schedule`, ended by `_abort` in the device's thread

Where a side thread collates (a GPU), it schedules and copies the next batch while the last one runs, at the price that the
members of a batch are chosen one batch earlier. A failing input fails alone (see `forward`); an error of the device itself goes
to `Instruments.on_fatal`, which ends the process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipefleet.contract.records import JobFailure
from pipefleet.service import Service, Services
from pipefleet_workers.adapters.progress import STAGE
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.step import OnText, Schedule, Step, Update
from pipefleet_workers.items import Assembly, Batch, Unit
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.service_fit import ServiceFit
from pipefleet_workers.observe.stage_trace import Tracer
from pipefleet_workers.observe.totals import WorkCount
from pipefleet_workers.process.exit_codes import BROKEN_DEVICE, HUNG_FORWARD, end_process
from pipefleet_workers.process.watchdog import Watchdog, listen


@dataclass(frozen=True, slots=True)
class Instruments:
    """The observers of the device: counters, a fit of its service time, a trace, and `on_fatal` for a broken device."""

    metrics: Metrics
    fit: ServiceFit = field(default_factory=ServiceFit)
    tracer: Tracer = field(default_factory=lambda: Tracer(""))
    on_fatal: Callable[[int, str], None] = end_process
    work: WorkCount = field(default_factory=WorkCount)


class Device:
    """A service that owns the model. `on_complete` gets the items whose units have all ended, failed ones included."""

    def __init__(
        self,
        forward: Forward,
        room: BatchQueue,
        instruments: Instruments,
        on_complete: Callable[[Sequence[Assembly]], None],
        *,
        watchdog: Watchdog,
        timeout: float,
        collate_ahead: bool,
        on_text: OnText = lambda unit, tokens: None,
    ) -> None:
        """A forward may take `timeout` seconds, and collating as many. The caller starts the `watchdog`."""
        self._on_text = on_text
        self._forward = forward
        self._room = room
        self._instruments = instruments
        self._on_complete = on_complete
        self._aborted: queue.SimpleQueue[tuple[Unit, JobFailure]] = queue.SimpleQueue()
        self._ahead: queue.Queue[Schedule | None] | None = None
        self._forwarding = watchdog.slot(STAGE, timeout, HUNG_FORWARD)
        services = [self._service("device", self._run_batches)]
        if collate_ahead:
            self._ahead = queue.Queue(1)
            self._collating = watchdog.slot("collate", timeout)
            services.append(self._service("collate", self._collate_ahead))
        self._services = Services(*services)
        self._turn = threading.Lock()

    def start(self) -> None:
        """Begin. Does nothing while the device runs; waits for a `stop` that is under way."""
        with self._turn:
            self._services.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Run the units in the room, then end. Waits up to `timeout` seconds (None: no bound); returns whether it has ended."""
        with self._turn:
            return self._services.stop(timeout)

    def _service(self, name: str, loop: Callable[[threading.Event], None]) -> Service:
        return Service(name, loop, wake=self._room.wake, on_error=self._broken)

    def _broken(self, error: BaseException) -> None:
        """End the process: without this thread the worker would hold its jobs for ever."""
        reason = f"the device's thread ended: {type(error).__name__}: {error}"
        self._instruments.on_fatal(BROKEN_DEVICE, reason)

    def _run_batches(self, stopping: threading.Event) -> None:
        listen(self._forwarding)
        while (schedule := self._next(stopping)) is not None:
            self._abort()
            if schedule.batch is not None:
                self._execute(schedule.batch, schedule)
            del schedule  # otherwise the inputs stay in memory until the next batch has run

    def _next(self, stopping: threading.Event) -> Schedule | None:
        return self._schedule(stopping) if self._ahead is None else self._ahead.get()

    def _collate_ahead(self, stopping: threading.Event) -> None:
        assert self._ahead is not None
        listen(self._collating)
        while (schedule := self._schedule(stopping)) is not None:
            self._ahead.put(schedule if schedule.batch is None else self._collated(schedule.batch))
            del schedule
        self._ahead.put(None)

    def _collated(self, batch: Batch) -> Schedule:
        self._collating.begin(batch.units[0].assembly.work, len(batch.units) - 1)
        with self._instruments.tracer.span("collate", len(batch.units)):
            staged = self._forward.collate(batch)
        self._collating.rest()
        return Schedule(batch, staged)

    def _schedule(self, stopping: threading.Event) -> Schedule | None:
        """The next batch, without the units of jobs that were stopped; None at the end."""
        batch = self._room.take(stopping)
        if batch is None:
            return None
        live: list[Unit] = []
        for unit in batch.units:
            failure = unit.assembly.failure or unit.assembly.work.job.stopped(STAGE)
            if failure is None:
                live.append(unit)
            else:
                self._aborted.put((unit, failure))
        return Schedule(Batch(batch.key, live) if live else None)

    def _execute(self, batch: Batch, schedule: Schedule) -> None:
        step = Step(batch, self._tick, self._update, self._on_text)
        begin = time.perf_counter()
        self._forwarding.begin(batch.units[0].assembly.work, len(batch.units) - 1)
        with self._instruments.tracer.span(STAGE, len(batch.units)):
            outputs = self._forward.run(batch, step, schedule.staged)
        self._forwarding.rest()
        self._note(batch, time.perf_counter() - begin)
        step.end(outputs)

    def _tick(self) -> None:
        """At each step of a long forward: feed the watchdog, and end units that were aborted meanwhile."""
        self._forwarding.tick()
        self._abort()

    def _abort(self) -> None:
        """End the units that `_schedule` left out. Units are aborted only here."""
        aborted: list[tuple[Unit, JobFailure]] = []
        while not self._aborted.empty():
            aborted.append(self._aborted.get())
        if aborted:
            self._update(Update(aborted=aborted))

    def _update(self, update: Update) -> None:
        """Note the output or failure of each unit, and hand on the items that are complete. Units end only here."""
        ended: list[tuple[Unit, Any]] = [*update.ended, *update.aborted]
        complete = [unit.assembly for unit, output in ended if unit.assembly.collect(unit.index, output)]
        if update.ended and update.remaining:  # the watchdog shall name a unit that still runs
            self._forwarding.begin(update.remaining[0].assembly.work, len(update.remaining) - 1)
        if complete:
            self._on_complete(complete)

    def _note(self, batch: Batch, seconds: float) -> None:
        self._instruments.fit.add(batch.cost, seconds)
        self._instruments.work.add(seconds=seconds)
        useful = sum(unit.length + unit.fixed for unit in batch.units)
        self._instruments.metrics.batch(len(batch.units), padded=batch.cost, useful=useful, seconds=seconds)
