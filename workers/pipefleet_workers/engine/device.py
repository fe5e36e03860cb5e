"""The device's thread: it takes batches from the room, runs them, and hands complete items on. No other thread uses the model.

    CPU    device: take ─▶ collate and run ─▶ hand on
    GPU    collate: take ─▶ collate ─▶ copy ─┐
           device:                 run ◀────┘ ─▶ hand on      batch n + 1 is collated while batch n runs

The price of collating ahead: a batch is chosen one step early, so units that come during a run miss the next batch.
A failure of the thread ends the process, since the worker would hold its jobs for ever without it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipefleet.contract.records import JobFailure
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.transfer import Staged
from pipefleet_workers.items import Assembly, Batch, Unit
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.observe.service_fit import ServiceFit
from pipefleet_workers.observe.stage_trace import Tracer
from pipefleet_workers.observe.totals import WorkCount
from pipefleet_workers.process.exit_codes import BROKEN_DEVICE, HUNG_FORWARD, end_process
from pipefleet_workers.process.watchdog import Watchdog, listen

STAGE = "forward"


@dataclass(frozen=True, slots=True)
class Instruments:
    """The observers of the device: counters, a fit of its service time, a trace, and `on_fatal` for a broken device."""

    metrics: Metrics
    fit: ServiceFit = field(default_factory=ServiceFit)
    tracer: Tracer = field(default_factory=lambda: Tracer(""))
    on_fatal: Callable[[int, str], None] = end_process
    work: WorkCount = field(default_factory=WorkCount)


class Device:
    """One thread that owns the model. `on_complete` gets the items whose units have all ended, failed items included."""

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
    ) -> None:
        """A forward may take `timeout` seconds, and so may collating. The caller starts the `watchdog`."""
        self._forward = forward
        self._room = room
        self._instruments = instruments
        self._on_complete = on_complete
        self._forwarding = watchdog.slot(STAGE, timeout, HUNG_FORWARD)
        self._collecting = threading.Lock()
        self._ahead: queue.Queue[tuple[Batch, Staged | None] | None] | None = queue.Queue(1) if collate_ahead else None
        self._threads = [threading.Thread(target=self._guarded, args=(self._run_batches,), name="device", daemon=True)]
        if collate_ahead:
            self._collating = watchdog.slot("collate", timeout)
            collate = threading.Thread(target=self._guarded, args=(self._collate_ahead,), name="collate", daemon=True)
            self._threads.append(collate)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def tick(self) -> None:
        """Tell the watchdog from inside a forward that the forward is alive."""
        self._forwarding.tick()

    def release(self, unit: Unit, output: Any) -> None:
        """Hand on the output of a unit while its batch still runs. Called from inside the forward, at most once a unit."""
        unit.released = True
        self._hand_on([(unit, output)])

    def join(self) -> None:
        """Wait until the room is closed and all its units have run."""
        for thread in self._threads:
            thread.join()

    def _guarded(self, loop: Callable[[], None]) -> None:
        """Run a loop; its failure is fatal for the process, since without this thread the worker would hold its jobs for ever."""
        try:
            loop()
        except BaseException as error:
            self._instruments.on_fatal(BROKEN_DEVICE, f"the device's thread ended: {type(error).__name__}: {error}")
            raise

    def _run_batches(self) -> None:
        listen(self._forwarding)
        while (taken := self._next()) is not None:
            batch, staged = taken
            begin = time.perf_counter()
            self._forwarding.begin(batch.units[0].assembly.work, len(batch.units) - 1)
            with self._instruments.tracer.span(STAGE, len(batch.units)):
                outputs = self._forward.run(batch, staged)
            self._forwarding.rest()
            self._note(batch, time.perf_counter() - begin)
            self._hand_on([(unit, output) for unit, output in outputs if not unit.released])
            del taken, batch, staged, outputs  # otherwise they stay in memory until the next batch has run

    def _next(self) -> tuple[Batch, Staged | None] | None:
        if self._ahead is not None:
            return self._ahead.get()
        batch = self._live_batch()
        return None if batch is None else (batch, None)

    def _collate_ahead(self) -> None:
        assert self._ahead is not None
        listen(self._collating)
        while (batch := self._live_batch()) is not None:
            self._collating.begin(batch.units[0].assembly.work, len(batch.units) - 1)
            with self._instruments.tracer.span("collate", len(batch.units)):
                staged = self._forward.collate(batch)
            self._collating.rest()
            self._ahead.put((batch, staged))
        self._ahead.put(None)

    def _live_batch(self) -> Batch | None:
        """The next batch, without the units of stopped jobs; None when the room is closed and empty."""
        while (batch := self._room.take()) is not None:
            live = [unit for unit in batch.units if not self._dropped(unit)]
            if live:
                return Batch(batch.key, live)
        return None

    def _dropped(self, unit: Unit) -> bool:
        """Drop a unit whose job was stopped, or whose item has failed in another unit. Returns whether it was dropped."""
        failure = unit.assembly.failure or unit.assembly.work.job.stopped(STAGE)
        if failure is not None:
            self._hand_on([(unit, failure)])
        return failure is not None

    def _hand_on(self, outputs: Sequence[tuple[Unit, Any | JobFailure]]) -> None:
        # The device's thread may end one unit of an item while the collating thread drops another.
        with self._collecting:
            complete = [unit.assembly for unit, output in outputs if unit.assembly.collect(unit.index, output)]
        if complete:
            self._on_complete(complete)

    def _note(self, batch: Batch, seconds: float) -> None:
        self._instruments.fit.add(batch.cost, seconds)
        self._instruments.work.add(seconds=seconds)
        useful = sum(unit.length + unit.fixed for unit in batch.units)
        self._instruments.metrics.batch(len(batch.units), padded=batch.cost, useful=useful, seconds=seconds)
