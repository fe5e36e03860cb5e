"""The device: takes batches from the room before it, runs them, and hands complete items on. Only its lanes touch the model.

    room ─▶ schedule ─▶ execute, in a lane ─▶ update ─▶ on_complete: items whose units have all ended
                                                ▲
    units of stopped jobs ─────────────────────┘  aborted: found by `_schedule`, ended by `_abort` in the thread of a lane

A lane is a thread that runs one batch at a time; the warm-up measures how many lanes pay. Each has its own slot at the watchdog.
Where a side thread collates (a GPU), it schedules and copies the next batches while others run, at the price that the members of a
batch are chosen one batch earlier. A failing input fails alone (see `forward`); an error of the device itself goes to
`Instruments.on_fatal`, which ends the process.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipefleet.contract.records import JobFailure
from pipefleet.service import Service, Services
from pipefleet_workers.adapters.progress import STAGE
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.lane import Lane, Sharing
from pipefleet_workers.engine.step import OnText, Schedule, Step, Update
from pipefleet_workers.engine.transfer import Staged
from pipefleet_workers.items import Assembly, Batch, Unit
from pipefleet_workers.models.lanes import Lanes, lane_stream
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
    """A service that owns the model. `on_complete` gets the items whose units have all ended, failed ones included.

    With several lanes, `on_complete` is called by several threads.
    """

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
        lanes: Lanes | None = None,
        where: torch.device | None = None,
    ) -> None:
        """A forward may take `timeout` seconds, and collating as many. The caller starts the `watchdog`.

        `where` is the device of the model; None for the CPU.
        """
        self._on_text = on_text
        self._forward = forward
        self._room = room
        self._instruments = instruments
        self._on_complete = on_complete
        self._aborted: queue.SimpleQueue[tuple[Unit, JobFailure]] = queue.SimpleQueue()
        self._ahead: queue.Queue[Schedule | None] | None = None
        self._plan, self._where = lanes or Lanes(), where or torch.device("cpu")
        self._sharing = Sharing()
        self._lanes = [
            Lane(index, self._plan, watchdog.slot(STAGE, timeout, HUNG_FORWARD)) for index in range(self._plan.count)
        ]
        self._small: set[int] = set()
        """The lanes that run a small batch. Until its end the other lanes begin none: a forward of many units takes little longer
        than a forward of few, and short forwards side by side only wait for each other."""
        self._ending = threading.Lock()
        services = [self._service("device", self._run_batches, threads=self._plan.count)]
        if collate_ahead:
            self._ahead = queue.Queue(self._plan.count)
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

    def _service(self, name: str, loop: Callable[[threading.Event], None], threads: int = 1) -> Service:
        return Service(name, loop, wake=self._room.wake, on_error=self._broken, threads=threads)

    def _broken(self, error: BaseException) -> None:
        """End the process: without this thread the worker would hold its jobs for ever."""
        reason = f"the device's thread ended: {type(error).__name__}: {error}"
        self._instruments.on_fatal(BROKEN_DEVICE, reason)

    def _run_batches(self, stopping: threading.Event) -> None:
        lane = self._lanes.pop()
        listen(lane.slot)
        try:
            with lane_stream(self._where, self._plan):
                while (schedule := self._next(stopping)) is not None:
                    self._abort()
                    if schedule.batch is not None:
                        self._execute(lane, schedule.batch, schedule)
                    del schedule  # otherwise the inputs stay in memory until the next batch has run
        finally:
            self._lanes.append(lane)

    def _next(self, stopping: threading.Event) -> Schedule | None:
        return self._schedule(stopping) if self._ahead is None else self._ahead.get()

    def _collate_ahead(self, stopping: threading.Event) -> None:
        assert self._ahead is not None
        listen(self._collating)
        while (schedule := self._schedule(stopping)) is not None:
            self._ahead.put(schedule if schedule.batch is None else self._collated(schedule.batch))
            del schedule
        for _ in range(self._plan.count):
            self._ahead.put(None)

    def _collated(self, batch: Batch) -> Schedule:
        self._collating.begin(batch.units[0].assembly.work, len(batch.units) - 1)
        with self._instruments.tracer.span("collate", len(batch.units)):
            staged = self._forward.collate(batch)
        self._collating.rest()
        return Schedule(batch, staged)

    def _schedule(self, stopping: threading.Event) -> Schedule | None:
        """The next batch, without the units of jobs that were stopped; None at the end."""
        batch = self._room.take(stopping, lambda: bool(self._small))
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

    def _execute(self, lane: Lane, batch: Batch, schedule: Schedule) -> None:
        step = Step(batch, functools.partial(self._tick, lane), functools.partial(self._update, lane), self._on_text)
        if self._plan.count > 1 and self._forward.excludes(batch):
            return self._run_alone(lane, batch, step, schedule.staged)
        with self._small_alone(lane, batch):
            begun = self._sharing.begin()
            lane.share(batch.cost, alone=self._sharing.running == 1 and not len(self._room))
            outputs = self._run(lane, batch, step, schedule.staged, begun)
        lacking = [unit for unit, output in outputs if self._lacks_memory(output) and step.remains(unit)]
        again = set(map(id, lacking))
        step.end([(unit, output) for unit, output in outputs if id(unit) not in again])
        for unit in lacking:
            self._run_alone(lane, Batch(batch.key, [unit]), step)

    @contextlib.contextmanager
    def _small_alone(self, lane: Lane, batch: Batch) -> Iterator[None]:
        """A context that keeps other lanes from beginning while a small batch runs."""
        if self._plan.count == 1 or batch.cost > self._plan.one_thread:
            yield
            return
        self._small.add(lane.index)
        try:
            yield
        finally:
            self._small.discard(lane.index)
            self._room.wake()

    def _run(
        self, lane: Lane, batch: Batch, step: Step, staged: Staged | None, begun: float
    ) -> list[tuple[Unit, Any | JobFailure]]:
        begin = time.perf_counter()
        lane.slot.begin(batch.units[0].assembly.work, len(batch.units) - 1)
        try:
            with self._instruments.tracer.span(STAGE, len(batch.units)):
                outputs = self._forward.run(batch, step, staged)
        finally:
            device_seconds = self._sharing.end(begun)
        lane.slot.rest()
        self._note(lane, batch, time.perf_counter() - begin, device_seconds)
        return outputs

    def _lacks_memory(self, output: Any) -> bool:
        """Whether a unit failed for want of memory that another lane may have held."""
        return self._plan.count > 1 and isinstance(output, JobFailure) and output.code == "out_of_memory"

    def _run_alone(self, lane: Lane, batch: Batch, step: Step, staged: Staged | None = None) -> None:
        """Run a batch while the other lanes wait."""
        with self._sharing.alone() as begun:
            lane.share(batch.cost, alone=True)
            outputs = self._run(lane, batch, step, staged, begun)
        step.end(outputs)

    def _tick(self, lane: Lane) -> None:
        """At each step of a long forward: feed the watchdog, and end units that were aborted meanwhile."""
        lane.slot.tick()
        self._abort()

    def _abort(self) -> None:
        """End the units that `_schedule` left out. Units are aborted only here."""
        aborted: list[tuple[Unit, JobFailure]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                aborted.append(self._aborted.get_nowait())
        if aborted:
            self._end(Update(aborted=aborted))

    def _update(self, lane: Lane, update: Update) -> None:
        """At the end of some or all units of a batch: end them, and let the watchdog name a unit that still runs."""
        if update.ended and update.remaining:
            lane.slot.begin(update.remaining[0].assembly.work, len(update.remaining) - 1)
        self._end(update)

    def _end(self, update: Update) -> None:
        """Note the output or failure of each unit, and hand on the items that are complete. Units end only here."""
        ended: list[tuple[Unit, Any]] = [*update.ended, *update.aborted]
        with self._ending:  # the units of one item may end in several lanes
            complete = [unit.assembly for unit, output in ended if unit.assembly.collect(unit.index, output)]
        if complete:
            self._on_complete(complete)

    def _note(self, lane: Lane, batch: Batch, seconds: float, device_seconds: float) -> None:
        self._instruments.fit.add(batch.cost, device_seconds)
        self._instruments.work.add(seconds=device_seconds)
        useful = sum(unit.length + unit.fixed for unit in batch.units)
        metrics = self._instruments.metrics
        metrics.batch(len(batch.units), padded=batch.cost, useful=useful, seconds=seconds, busy=device_seconds)
        metrics.lane(lane.index, seconds)
