"""The engine, the file to read first: the stages of a worker, wired with bounded queues so that they all run at once.

    admit ─▶ fetch ─▶ decode + preprocess ─▶ batch ─▶ forward ─▶ finish ─▶ the job's sink
             threads  threads                room     one thread  threads

A message's thread (see `consumer`) admits the items of its job, waits for their outcomes, writes them and acknowledges. Any
stage's failure goes straight to the sink: every admitted item has exactly one outcome.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipefleet.records import JobFailure
from pipefleet.storage import refs_in
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.admission import Budget
from pipefleet_workers.batch_queue import BatchQueue
from pipefleet_workers.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.items import Assembly, Batch, Fetched, ItemError, Outcome, Unit, Work
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.stages.decode import Decoder
from pipefleet_workers.stages.fetch import Fetcher, slices
from pipefleet_workers.stages.forward import Forward

log = logging.getLogger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")
_STOP_RANK = 1 << 30


@dataclass(frozen=True, slots=True)
class Stages:
    """What the engine runs: one object for each kind of work."""

    fetcher: Fetcher
    decoder: Decoder
    adapter: Adapter


class Engine:
    """One model on one device, fed by any number of threads through `admit`."""

    def __init__(self, stages: Stages, limits: BatchLimits, settings: WorkerSettings, *, slice_items: int) -> None:
        self._stages = stages
        self._slice_items = slice_items
        self._forward = Forward(stages.adapter)
        self._budget = Budget(settings.in_flight_items, settings.in_flight_bytes)
        self._room = BatchQueue(MicroBatcher(limits), settings.window_units)
        self._finish = _Stage("finish", settings.finish_threads, self._finish_assemblies, room=256)
        self._cpu = _Stage("cpu", settings.cpu_threads, self._decode_and_prepare, room=4 * settings.cpu_threads)
        self._fetch = _Stage("fetch", settings.fetch_threads, self._fetch_slice, room=2 * settings.fetch_threads)
        self._device = threading.Thread(target=self._device_loop, name="device", daemon=True)

    def start(self) -> None:
        """Start the threads. They are daemons: a worker that must end does not wait for them."""
        for stage in (self._finish, self._cpu, self._fetch):
            stage.start()
        self._device.start()

    def admit(self, works: Sequence[Work], *, bulk: bool) -> None:
        """Take in items; each one's outcome goes to its job's sink. Bulk work waits here while the worker is full."""
        for piece in slices(works, self._slice_items):
            if bulk:
                self._budget.acquire(len(piece), sum(work.weight for work in piece))
            has_objects = any(refs_in(work.item.inputs) for work in piece)
            if has_objects:
                self._fetch.put(piece[0].job.priority, piece)
            else:
                self._cpu.put(piece[0].job.priority, [Fetched(work, work.item.inputs) for work in piece])

    def release(self, works: Sequence[Work]) -> None:
        """Give back the room of bulk items whose outcomes have been written."""
        self._budget.release(len(works), sum(work.weight for work in works))

    def stop(self) -> None:
        """Finish what is inside, then end the threads."""
        self._budget.close()
        self._fetch.stop()
        self._cpu.stop()
        self._room.close()
        self._device.join()
        self._finish.stop()

    def _fetch_slice(self, works: Sequence[Work]) -> None:
        fetched = self._each(works, "fetch", self._stages.fetcher.fetch, work_of=_itself)
        if fetched:
            self._cpu.put(works[0].job.priority, fetched)

    def _decode_and_prepare(self, fetched: Sequence[Fetched]) -> None:
        decoded = self._each(fetched, "decode", self._stages.decoder.decode, work_of=_work)
        begin = time.perf_counter()
        prepared = self._stages.adapter.prepare(decoded)
        share = (time.perf_counter() - begin) / max(1, len(decoded))
        for one, units in zip(decoded, prepared, strict=True):
            one.work.seconds["preprocess"] = share
            if isinstance(units, ItemError):
                self._deliver(one.work, units.failure)
            elif not units:
                self._deliver(one.work, JobFailure("bad_input", "the input is empty for this model", "preprocess"))
            else:
                self._room.put(units)

    def _device_loop(self) -> None:
        while (batch := self._room.take()) is not None:
            live = [unit for unit in batch.units if not self._is_stopped(unit)]
            if live:
                done = self._forward.run(Batch(batch.key, live))
                complete = [unit.assembly for unit, output in done if self._collect(unit, output)]
                if complete:
                    self._finish.put(min(one.work.job.priority for one in complete), complete)

    def _is_stopped(self, unit: Unit) -> bool:
        """Drop a unit whose job should go no further; the item ends once, however many units it has."""
        failure = unit.assembly.work.job.stopped("forward")
        if failure is not None and self._collect(unit, failure):
            self._finish.put(unit.priority, [unit.assembly])
        return failure is not None

    @staticmethod
    def _collect(unit: Unit, output: Any | JobFailure) -> bool:
        """Note a unit's output. True when it was the last one of its item."""
        assembly = unit.assembly
        if isinstance(output, JobFailure):
            assembly.failure = assembly.failure or output
        assembly.outputs[unit.index] = output
        return len(assembly.outputs) == assembly.expected

    def _finish_assemblies(self, assemblies: Sequence[Assembly]) -> None:
        for assembly in assemblies:
            if assembly.failure is not None:
                self._deliver(assembly.work, assembly.failure)
                continue
            begin = time.perf_counter()
            try:
                output = self._stages.adapter.finish(assembly)
            except Exception as error:  # noqa: BLE001 - whatever a pipeline raises is this item's failure alone
                failure = JobFailure("model_error", f"postprocessing failed: {brief(error)}", "postprocess")
                self._deliver(assembly.work, failure)
                continue
            assembly.work.seconds["postprocess"] = time.perf_counter() - begin
            assembly.work.job.sink.deliver(Outcome(assembly.work, output=output))

    def _each(
        self, items: Sequence[_In], stage: str, do: Callable[[_In], _Out], *, work_of: Callable[[Any], Work]
    ) -> list[_Out]:
        """`do` for every item whose job goes on; failures are delivered, the others returned in order."""
        done: list[_Out] = []
        for item in items:
            work = work_of(item)
            failure = work.job.stopped(stage)
            if failure is None:
                try:
                    done.append(do(item))
                    continue
                except ItemError as error:
                    failure = error.failure
                except Exception as error:
                    log.exception("stage %s failed on item %s of job %s", stage, work.item.id, work.job.id)
                    failure = JobFailure("internal_error", brief(error), stage)
            self._deliver(work, failure)
        return done

    @staticmethod
    def _deliver(work: Work, failure: JobFailure) -> None:
        work.job.sink.deliver(Outcome(work, failure=failure))


class _Stage:
    """Threads that take from one bounded queue, the most urgent first and equally urgent ones in order."""

    def __init__(self, name: str, threads: int, handle: Callable[[Any], None], *, room: int) -> None:
        self._name = name
        self._handle = handle
        self._queue: queue.PriorityQueue[tuple[int, int, Any]] = queue.PriorityQueue(room)
        self._order = itertools.count()
        self._threads = [
            threading.Thread(target=self._loop, name=f"{name}-{index}", daemon=True) for index in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def put(self, priority: int, item: Any) -> None:
        """Add one item; blocks while the queue is full."""
        self._queue.put((priority, next(self._order), item))

    def stop(self) -> None:
        """Work off the queue, then end the threads."""
        for _ in self._threads:
            self.put(_STOP_RANK, None)
        for thread in self._threads:
            thread.join()

    def _loop(self) -> None:
        while True:
            _, _, item = self._queue.get()
            if item is None:
                return
            try:
                self._handle(item)
            except Exception:
                log.exception("stage %s lost a slice; its job will not finish in this worker", self._name)


def _itself(work: Work) -> Work:
    return work


def _work(holder: Any) -> Work:
    found: Work = holder.work
    return found
