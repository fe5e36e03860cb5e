"""The device of a decoder whose requests join and leave at every step, instead of waiting for the batch before them.

    room ─▶ admit, in the room's order ─▶ step: a token for each unit inside ─▶ units that ended ─▶ on_complete
             ▲            │ park: a more urgent unit takes the room of a less urgent one, which goes on later
             └────────────┘

Units that the writer does not take run as ordinary batches, in the same thread. Such a batch gives a sign of life at each of its
steps, and then the units inside make a step too, so neither waits for the other. After a failed step each unit inside runs alone as
an ordinary batch, so a culprit fails alone; a broken device ends the process.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence

import torch

from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.base import brief
from pipefleet_workers.adapters.continuous import JOINS, ContinuousWriter, Turn
from pipefleet_workers.adapters.progress import STAGE
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.device import Device, Instruments
from pipefleet_workers.engine.forward import DeviceBrokenError, Forward, is_broken, out_of_memory
from pipefleet_workers.engine.lane import Lane
from pipefleet_workers.engine.step import OnText, Schedule, Update
from pipefleet_workers.items import Assembly, Batch, Unit, spend
from pipefleet_workers.process.watchdog import Watchdog, listen

log = logging.getLogger(__name__)
PARKED_SECONDS = 30.0
"""A unit that was parked for so long joins before more urgent ones, and then stays, so nothing starves."""
FAILED_STEPS = 3
"""After so many failed steps without a good one between, all units run as ordinary batches."""


class ContinuousDevice(Device):
    """A `Device` with a continuous writer. One thread touches the model, as ever."""

    def __init__(
        self,
        writer: ContinuousWriter,
        forward: Forward,
        room: BatchQueue,
        instruments: Instruments,
        on_complete: Callable[[Sequence[Assembly]], None],
        *,
        watchdog: Watchdog,
        timeout: float,
        on_text: OnText = lambda unit, tokens: None,
        where: torch.device | None = None,
    ) -> None:
        """A step, and a forward of an ordinary batch, may take `timeout` seconds. For `where` see `Device`."""
        super().__init__(
            forward, room, instruments, on_complete, watchdog=watchdog, timeout=timeout, collate_ahead=False,
            on_text=on_text, where=where,
        )  # fmt: skip
        (self._lane,) = self._lanes
        self._writer = writer
        self._inside: list[Unit] = []
        """In the order in which they joined."""
        self._parked: list[Unit] = []
        """The most urgent first."""
        self._since: dict[int, float] = {}
        """When each unit was parked first; until it ends."""
        self._staying: set[int] = set()
        self._alone: list[Unit] = []
        """Units of failed steps."""
        self._batching = False
        """Whether an ordinary batch runs, inside of which this thread makes steps."""
        self._failed = 0

    def _run_batches(self, stopping: threading.Event) -> None:
        listen(self._lane.slot)
        while True:
            batch = self._admit()
            if batch is not None:
                self._run_batch(batch)
            elif self._inside:
                self._step()
            elif not self._parked and not self._alone and not self._room.wait(stopping):
                break

    def _run_batch(self, batch: Batch) -> None:
        """Run an ordinary batch; `_tick` makes steps inside of it."""
        self._batching = True
        try:
            self._execute(self._lane, batch, Schedule(batch))
        finally:
            self._batching = False

    def _tick(self, lane: Lane) -> None:
        super()._tick(lane)
        if self._batching:
            self._admit()
            self._step()

    def _admit(self) -> Batch | None:
        """Let units join while there is room for them, in the room's order. Returns the next ordinary batch if it is its turn."""
        if self._alone and not self._batching:
            return self._live([self._alone.pop(0)])
        self._rejoin(time.monotonic() - PARKED_SECONDS)
        misses = 0
        while misses < 2:  # old units and urgent ones take turns at the head of the room
            batch = self._room.poll(self._most)
            if batch is None:
                misses += 1
            elif batch.key == JOINS and self._failed < FAILED_STEPS:
                self._make_room(batch.units[0])
                self._join(batch.units[0])
            elif (live := self._live(batch.units)) is not None:
                return live
        self._rejoin(time.monotonic())
        return None

    def _rejoin(self, before: float) -> None:
        """Let units that were parked before this time go on, while there is room."""
        old = time.monotonic() - PARKED_SECONDS
        for unit in [one for one in self._parked if self._since[id(one)] <= before]:
            if not self._writer.fits(unit):
                return
            if self._since[id(unit)] <= old:
                self._staying.add(id(unit))
            self._parked = _without(self._parked, [unit])
            self._join(unit)

    def _most(self, unit: Unit) -> int:
        """How many units of this kind may leave the room now. The room calls it under its lock."""
        if unit.key != JOINS or self._failed >= FAILED_STEPS:
            return 0 if self._batching else 1 if unit.key == JOINS else sys.maxsize
        if self._parked and self._parked[0].priority <= unit.priority:
            return 0
        less = self._less_urgent(unit)
        return 1 if self._writer.fits(unit) or (less and self._writer.fits(unit, without=less)) else 0

    def _make_room(self, unit: Unit) -> None:
        """Park less urgent units until a unit fits: the least urgent first, and among them the one that joined last."""
        less = self._less_urgent(unit)
        while less and not self._writer.fits(unit):
            lowest = max(one.priority for one in less)
            victim = next(one for one in reversed(less) if one.priority == lowest)
            less = _without(less, [victim])
            self._writer.park(victim)
            self._inside = _without(self._inside, [victim])
            self._park([victim])

    def _less_urgent(self, unit: Unit) -> list[Unit]:
        """The units inside that may be parked for a unit, in the order in which they joined."""
        return [one for one in self._inside if one.priority > unit.priority and id(one) not in self._staying]

    def _park(self, units: Sequence[Unit]) -> None:
        for unit in units:
            self._since.setdefault(id(unit), time.monotonic())
        self._parked = sorted([*self._parked, *units], key=lambda one: (one.priority, one.created))

    def _join(self, unit: Unit) -> None:
        if self._live([unit]) is not None:
            self._writer.join(unit)
            self._inside.append(unit)

    def _live(self, units: Sequence[Unit]) -> Batch | None:
        """The units whose jobs go on; the others are aborted."""
        stopped = {id(unit): failure for unit in units if (failure := _stopped(unit)) is not None}
        self._leave([(unit, stopped[id(unit)]) for unit in units if id(unit) in stopped])
        live = [unit for unit in units if id(unit) not in stopped]
        return Batch(live[0].key, live) if live else None

    def _leave(self, aborted: Sequence[tuple[Unit, JobFailure]]) -> None:
        self._forget([unit for unit, _ in aborted])
        if aborted:
            self._end(Update(aborted=aborted))

    def _forget(self, units: Sequence[Unit]) -> None:
        """Keep nothing of units that have ended here, or run as batches now."""
        for unit in units:
            self._writer.forget(unit)
            self._since.pop(id(unit), None)
            self._staying.discard(id(unit))

    def _step(self) -> None:
        """One step of the units inside, without those whose jobs were stopped."""
        stopped = [
            (unit, failure) for unit in (*self._inside, *self._parked) if (failure := _stopped(unit)) is not None
        ]
        if stopped:
            gone = [unit for unit, _ in stopped]
            self._inside, self._parked = _without(self._inside, gone), _without(self._parked, gone)
            self._leave(stopped)
        if not self._inside:
            return
        slot, work, others = self._lane.slot, self._inside[0].assembly.work, len(self._inside) - 1
        if self._batching:
            with slot.meanwhile(work, others):
                self._write()
        else:
            slot.begin(work, others)
            self._write()

    def _write(self) -> None:
        begin = time.perf_counter()
        try:
            with self._instruments.tracer.span(STAGE, len(self._inside)):
                turn = self._writer.step()
        except Exception as error:  # noqa: BLE001 - whatever a model raises; each unit runs again
            self._recover(error)
            return
        self._failed = 0
        self._count(time.perf_counter() - begin)
        self._hand_on(turn)

    def _count(self, seconds: float) -> None:
        inside = len(self._inside)
        spend([unit.assembly.work for unit in self._inside], STAGE, seconds / inside)
        if not self._batching:  # otherwise the batch around this step counts its seconds
            self._instruments.work.add(seconds=seconds)
            metrics = self._instruments.metrics
            metrics.batch(inside, padded=inside, useful=inside, seconds=seconds, busy=seconds)
            metrics.lane(self._lane.index, seconds)

    def _hand_on(self, turn: Turn) -> None:
        for unit, tokens in turn.read_along:
            self._on_text(unit, tokens)
        if turn.ended:
            for unit, _ in turn.ended:
                self._instruments.fit.add(unit.length, unit.assembly.work.seconds[STAGE])
            ended = [unit for unit, _ in turn.ended]
            self._forget(ended)
            self._inside = _without(self._inside, ended)
            self._update(self._lane, Update(ended=turn.ended, remaining=self._inside))
        if not self._inside and not self._batching:
            self._lane.slot.rest()

    def _recover(self, error: Exception) -> None:
        """After a failed step: when memory ran out, go on with fewer units; otherwise each unit runs alone."""
        if is_broken(error):
            raise DeviceBrokenError(f"the device is broken: {brief(error)}") from error
        units, self._inside = self._inside, []
        self._writer.clear()
        log.warning("a step of %d requests failed (%s); going on with fewer, or alone", len(units), brief(error))
        if out_of_memory(error) and len(units) > 1:
            self._writer.shrink()
            self._park(units)
            return
        self._failed += 1
        self._forget(units)
        self._alone += units
        if self._failed == FAILED_STEPS:
            log.error("%d steps failed in a row; all requests run as ordinary batches from now on", self._failed)
            self._forget(self._parked)
            self._alone += self._parked
            self._parked = []


def _without(units: Sequence[Unit], gone: Sequence[Unit]) -> list[Unit]:
    names = set(map(id, gone))
    return [unit for unit in units if id(unit) not in names]


def _stopped(unit: Unit) -> JobFailure | None:
    return unit.assembly.failure or unit.assembly.work.job.stopped(STAGE)
