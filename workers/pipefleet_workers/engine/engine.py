"""The engine wires the stages of a worker with bounded queues, so that all stages run at the same time. Read this file first.

    admit ─▶ fetch ─▶ decode + preprocess ─▶ room ─▶ forward ─▶ finish ─▶ store ─▶ the job's sink
             threads  threads (`cpu`)        units   lanes       threads   threads

`consume` admits the items of a job, waits for their outcomes, writes them, and acknowledges the message. A failure in any stage
goes straight to the sink: every admitted item has exactly one outcome, unless its job is given back as a whole. Each item gives
its room back when it ends (`_end`, `_each`), so a job may be larger than the worker.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipefleet.contract.records import JobFailure
from pipefleet.errors import ServiceFullError, ServiceUnavailableError
from pipefleet.service import Stoppable
from pipefleet_workers.adapters.base import Adapter, brief
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.engine.budget import Budget
from pipefleet_workers.engine.continuous import ContinuousDevice
from pipefleet_workers.engine.device import Device, Instruments
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.processes import PreprocessPool
from pipefleet_workers.engine.simulated import SimulatedForward
from pipefleet_workers.engine.stage import Stage, work_of
from pipefleet_workers.engine.transfer import Transfer
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import (
    Assembly,
    Decoded,
    Fetched,
    Finished,
    ItemError,
    JobContext,
    Outcome,
    OutgrownError,
    Unit,
    Work,
    spend,
)
from pipefleet_workers.models.lanes import Lanes, lanes_of
from pipefleet_workers.observe.service_fit import ServiceTime
from pipefleet_workers.process.sizes import bytes_of
from pipefleet_workers.process.watchdog import Watchdog, waiting, working_on
from pipefleet_workers.results.lines import ResultWriter
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import BarredError, RefusedHereError

log = logging.getLogger(__name__)
_In = TypeVar("_In", Work, Fetched, Decoded, Finished)
_Out = TypeVar("_Out")
_Held = TypeVar("_Held", Fetched, Assembly)
TOGETHER_SECONDS = 0.005
"""Results of bulk items that are finished within these seconds leave together; the result of a single job leaves at once."""


class Readers(Stoppable, Protocol):
    """Where new tokens go while a job still runs, for clients that read along. Both methods return at once."""

    def wrote(self, unit: Unit, tokens: Sequence[int]) -> None:
        """A unit has these new tokens by now."""

    def ended(self, job: JobContext) -> None:
        """No more tokens of a job come from here."""


@dataclass(frozen=True, slots=True)
class Stages:
    """The parts that the engine runs: one object for each kind of work."""

    fetcher: Fetcher
    decoder: Decoder
    adapter: Adapter
    processes: PreprocessPool | None = None
    """With this pool, decoding and preprocessing happen in its processes. The engine starts and stops it."""
    results: ResultWriter | None = None
    """Makes results ready to be written. Without it, an outcome carries the adapter's own value."""
    streams: Readers | None = None
    """Tells clients the text that is being written. Without it, nobody reads a text before its end."""


class Engine:
    """One model on one device; any number of threads feed it through `admit`. Thread-safe."""

    def __init__(
        self,
        stages: Stages,
        limits: BatchLimits,
        settings: WorkerSettings,
        instruments: Instruments,
        *,
        slice_items: int,
        lanes: Lanes | None = None,
    ) -> None:
        """`lanes` are the forwards that run at once; None for one, with all of torch's threads."""
        self._stages = stages
        self._slice_items = min(slice_items, settings.in_flight_items)
        self._instruments = instruments
        self._budget = Budget(settings.in_flight_items, settings.in_flight_bytes)
        self.room = BatchQueue(MicroBatcher(limits), settings.window_units)
        self._watchdog = Watchdog(instruments.on_fatal)
        self._device = self._made_device(settings, lanes)
        cpu, fetch = settings.cpu_threads, settings.fetch_threads
        if stages.processes is not None:
            cpu = settings.preprocess_processes  # each thread of the stage waits for one process
        store, seconds = settings.store_threads, settings.stage_timeout
        stage = functools.partial(Stage, end=self._end, watchdog=self._watchdog, seconds=seconds)
        self._store = stage("store", store, self._store_results, room=store)
        self._finish = stage("finish", settings.finish_threads, self._finish_assemblies, room=256)
        self._cpu = stage("cpu", cpu, self._decode_and_prepare, room=4 * cpu)
        self._fetch = stage("fetch", fetch, self._fetch_slice, room=2 * fetch, watchdog=None)
        self._turn = threading.Lock()

    def _made_device(self, settings: WorkerSettings, lanes: Lanes | None) -> Device:
        adapter = self._stages.adapter
        parts = _forward(adapter, self.room, settings.simulated_device), self.room, self._instruments, self._complete
        common: dict[str, Any] = {
            "watchdog": self._watchdog,
            "timeout": settings.forward_timeout,
            "on_text": self._tell_text,
            "where": adapter.pipe.device,
        }
        if adapter.continuous is not None:
            return ContinuousDevice(adapter.continuous, *parts, **common)
        ahead = adapter.pipe.device.type != "cpu"
        return Device(*parts, **common, collate_ahead=ahead, lanes=lanes or lanes_of(adapter.pipe.device))

    def start(self) -> None:
        """Start processes and threads, unless they run already. All are daemons: a worker that must end does not wait for them.

        Raises UsageError when a process cannot start.
        """
        with self._turn:
            if self._stages.processes is not None:
                self._stages.processes.start()
            self._budget.open()
            streams: list[Stoppable] = [] if self._stages.streams is None else [self._stages.streams]
            for service in (*streams, self._store, self._finish, self._cpu, self._fetch, self._device, self._watchdog):
                service.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish the items inside, then end, within `timeout` seconds (None: no bound). Whether all threads have ended.

        Each stage ends after the stages that feed it.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._turn:
            self._budget.close()
            ended = [_stopped(self._fetch, end), _stopped(self._cpu, end)]
            if self._stages.processes is not None and all(ended):
                self._stages.processes.stop()
            ended += [_stopped(one, end) for one in (self._device, self._finish, self._store)]
            if self._stages.streams is not None:
                ended.append(_stopped(self._stages.streams, end))
            self._watchdog.stop()
            return all(ended)

    def admit(self, works: Sequence[Work], *, bulk: bool) -> None:
        """Take in items; the outcome of each goes to its job's sink. Bulk items wait here while the worker is full.

        There may be any number of items, since each gives its room back when it ends. If a job is stopped while its items wait
        here, they end as stopped.
        """
        for piece in self._pieces(works):
            if bulk and not self._entered(piece):
                continue
            if any(work.fetches for work in piece):
                self._fetch.put(piece[0].job.priority, piece)
            else:
                self._cpu.put(piece[0].job.priority, [Fetched(work, work.item.inputs) for work in piece])

    def _pieces(self, works: Sequence[Work]) -> Iterator[list[Work]]:
        """The items in slices; the budget has room for each slice."""
        piece: list[Work] = []
        size = 0
        for work in works:
            if piece and (len(piece) >= self._slice_items or size + work.weight > self._budget.portion):
                yield piece
                piece, size = [], 0
            piece.append(work)
            size += work.weight
        if piece:
            yield piece

    def _entered(self, piece: Sequence[Work]) -> bool:
        """Wait for room for bulk items. False when their job was stopped meanwhile; then the items have ended."""
        job = piece[0].job
        if self._budget.enter(piece, lambda: job.stopped("consume")):
            return True
        for work in piece:
            failure = job.stopped("consume")
            assert failure is not None
            self._fail(work, failure)
        return False

    def _fetch_slice(self, works: Sequence[Work]) -> None:
        with self._instruments.tracer.span("fetch", len(works)):
            fetched = self._each(works, "fetch", self._stages.fetcher.fetch)
        if fetched:
            self._cpu.put(works[0].job.priority, fetched)

    def _decode_and_prepare(self, fetched: Sequence[Fetched]) -> None:
        """Decode and prepare items in portions that the budget has room for."""
        weighed = list(zip(fetched, self._stages.decoder.weights(fetched), strict=True))
        for piece in self._portions(weighed):
            outgrown = self._let_in(piece)
            while outgrown:
                outgrown = [*self._let_in([outgrown[0]]), *outgrown[1:]]

    def _let_in(self, piece: Sequence[tuple[Fetched, int]]) -> list[tuple[Fetched, int]]:
        """Decode and prepare items when there is room.

        Returns the items that need more bytes than they declared, with these bytes.
        """
        works = [(one.work, size) for one, size in piece]
        with waiting():
            self._budget.decode(works, functools.partial(_all_stopped, works))
        try:
            return self._prepare_piece([one for one, _ in piece])
        except BaseException as error:  # noqa: BLE001 - `fail` logs it; items of other pieces may be further already
            self._cpu.fail([one for one, _ in piece], error)
            return []

    def _prepare_piece(self, fetched: Sequence[Fetched]) -> list[tuple[Fetched, int]]:
        tracer, processes = self._instruments.tracer, self._stages.processes
        if processes is not None:
            live = self._each(fetched, "decode", lambda one: one)
            with tracer.span("preprocess", len(live)), waiting():  # the pool itself watches its processes
                prepared = processes.prepare(live)
            self._enter([one.work for one in live], prepared)
            return []  # only audio inputs can outgrow their declared size, and no audio task is prepared in processes
        with tracer.span("decode", len(fetched)):
            decoded, outgrown = self._decode_all(fetched)
        with tracer.span("preprocess", len(decoded)):
            prepared = self._prepare(decoded)
        works = [one.work for one in decoded]
        del decoded  # otherwise pictures stay in memory while their units wait for the device
        self._enter(works, prepared)
        return outgrown

    def _decode_all(self, fetched: Sequence[Fetched]) -> tuple[Sequence[Decoded], list[tuple[Fetched, int]]]:
        """The decoded items, and the items that need more bytes than their reserved room. A slice of texts is decoded at once."""
        jobs = {id(one.work.job): one.work.job for one in fetched}.values()
        if not any(job.stopped("decode") for job in jobs):
            texts = self._stages.decoder.texts(fetched)
            if texts is not None:
                return texts, []
        tried = self._each(fetched, "decode", self._decode)
        outgrown = [one for one in tried if isinstance(one, tuple)]
        self._budget.prepared([(one.work, 0) for one, _ in outgrown])
        return [one for one in tried if isinstance(one, Decoded)], outgrown

    def _decode(self, fetched: Fetched) -> Decoded | tuple[Fetched, int]:
        """The decoded item. If it needs more bytes than its reserved room: the item, and the bytes that it needs."""
        try:
            return self._stages.decoder.decode(fetched)
        except OutgrownError as error:
            return fetched, error.size

    def _enter(self, works: Sequence[Work], prepared: Sequence[list[Unit] | ItemError]) -> None:
        """Put the units of all items into the room before the device in one call; end the items that have no units."""
        entering: list[Unit] = []
        self._budget.prepared([(work, _bytes_of(units)) for work, units in zip(works, prepared, strict=True)])
        for work, units in zip(works, prepared, strict=True):
            if isinstance(units, ItemError):
                self._fail(work, units.failure)
            elif not units:
                self._fail(work, JobFailure("bad_input", "the input is empty for this model", "preprocess"))
            else:
                entering += units
        if entering:
            with waiting():
                self.room.put(entering)

    def _prepare(self, decoded: Sequence[Decoded]) -> list[Any]:
        if decoded:
            working_on(decoded[0].work, len(decoded) - 1)
        begin = time.perf_counter()
        prepared = self._stages.adapter.prepare(decoded)
        spend([one.work for one in decoded], "preprocess", (time.perf_counter() - begin) / max(1, len(decoded)))
        return prepared

    def _complete(self, assemblies: Sequence[Assembly]) -> None:
        sizes = ((one, 0 if one.failure else bytes_of(one.outputs)) for one in assemblies)
        for held in self._portions(sizes):
            with waiting():
                self._budget.hold([(one.work, size) for one, size in held])
            self._finish.put(min(one.work.job.priority for one, _ in held), [one for one, _ in held])

    def _portions(self, sizes: Iterable[tuple[_Held, int]]) -> Iterator[list[tuple[_Held, int]]]:
        """Items with their bytes, in lists; the budget has room for each list."""
        held: list[tuple[_Held, int]] = []
        total = 0
        for one, size in sizes:
            if held and total + size > self._budget.portion:
                yield held
                held, total = [], 0
            held.append((one, size))
            total += size
        yield held

    def _finish_assemblies(self, assemblies: Sequence[Assembly]) -> None:
        ended: list[Outcome] = []
        begin = time.perf_counter()
        try:
            with self._instruments.tracer.span("finish", len(assemblies)):
                for assembly in assemblies:
                    if (outcome := self._finish_one(assembly)) is not None:
                        ended.append(outcome)
                    alone = assembly.work.job.shard is None
                    if ended and (alone or time.perf_counter() - begin > TOGETHER_SECONDS):
                        self._finished(ended, begin)
                        begin, ended = time.perf_counter(), []
        finally:
            self._finished(ended, begin)

    def _finished(self, ended: Sequence[Outcome], begin: float) -> None:
        """Hand on results that were finished together since `begin`."""
        if ended:
            share = (time.perf_counter() - begin) / len(ended)
            spend([outcome.work for outcome in ended], "postprocess", share)
            self._succeed(ended)

    def _finish_one(self, assembly: Assembly) -> Outcome | None:
        """The result of an item; None if it has failed, or if its artifacts go to the store first."""
        work, results = assembly.work, self._stages.results
        failure = assembly.failure or (work.job.stopped("postprocess") if work.job.given_back else None)
        if failure is not None:
            self._fail(work, failure)
            return None
        if self._budget.stores:
            with waiting():
                self._budget.finish(work)
        working_on(work)
        begin = time.perf_counter()
        try:
            output = self._stages.adapter.finish(assembly)
        except BaseException as error:  # noqa: BLE001 - whatever a pipeline raises, a Rust panic too, is this item's failure alone
            failure = JobFailure("model_error", f"postprocessing failed: {brief(error)}", "postprocess")
            self._fail(work, failure)
            return None
        finally:
            assembly.outputs = {}  # this thread refers to the assembly until the whole slice is finished
        try:
            if results is None or (plain := results.plain(output)) is not None:
                return Outcome(work, output=output if results is None else plain)
            return self._write_or_store(results.take_apart(work, output), time.perf_counter() - begin)
        except ItemError as error:
            self._fail(work, error.failure)
            return None

    def _write_or_store(self, finished: Finished, seconds: float) -> Outcome | None:
        """The outcome of a result without artifacts. A result with artifacts goes to the store stage. Raises ItemError."""
        assert self._stages.results is not None
        if finished.artifacts:
            spend([finished.work], "postprocess", seconds)
            self._budget.weigh(finished.work, sum(one.size for one in finished.artifacts))
            self._store.put(finished.work.job.priority, [finished])
            return None
        return Outcome(finished.work, output=self._stages.results.write(finished))

    def _store_results(self, finished: Sequence[Finished]) -> None:
        with self._instruments.tracer.span("store", len(finished)):
            stored = self._each(finished, "write", self._store_one)
        for one in finished:
            one.artifacts.clear()  # this thread refers to the artifacts until it takes its next slice
        self._succeed(stored)

    def _store_one(self, finished: Finished) -> Outcome:
        assert self._stages.results is not None
        begin = time.perf_counter()
        encoded = self._stages.results.write(finished)
        spend([finished.work], "write", time.perf_counter() - begin)
        return Outcome(finished.work, output=encoded)

    def _each(self, items: Sequence[_In], stage: str, do: Callable[[Any], _Out]) -> list[_Out]:
        """Call `do` for every item whose job goes on. Failures are delivered; the results are returned in order."""
        done: list[_Out] = []
        for item in items:
            work = work_of(item)
            working_on(work)
            failure = work.job.stopped(stage)
            if failure is None:
                try:
                    done.append(do(item))
                    continue
                except ServiceUnavailableError as error:
                    # an outage is no failure of the item: the whole job runs again later
                    is_ours = isinstance(error, BarredError | RefusedHereError | ServiceFullError)
                    if work.job.patient or is_ours or work.job.is_away():
                        work.job.give_back(error)
                        self._budget.leave(work)
                        continue
                    failure = JobFailure(error.code, str(error), stage)
                except ItemError as error:
                    failure = error.failure
                except Exception as error:
                    where = {"job": work.job.id, "run": work.job.run_id}
                    log.exception("stage %s failed on item %s of job %s", stage, work.item.id, work.job.id, extra=where)
                    failure = JobFailure("internal_error", brief(error), stage)
            self._fail(work, failure)
        return done

    def _fail(self, work: Work, failure: JobFailure) -> None:
        if not work.job.given_back:
            self._instruments.metrics.processed([work.seconds])
        self._end(Outcome(work, failure=failure))

    def _succeed(self, outcomes: Sequence[Outcome]) -> None:
        self._instruments.metrics.processed([outcome.work.seconds for outcome in outcomes])
        self._end(*outcomes)

    def _end(self, *outcomes: Outcome) -> None:
        """The only way out for items, except for items whose job is being given back (see `_each`)."""
        self._budget.leave(*[outcome.work for outcome in outcomes])
        for _, own in itertools.groupby(outcomes, lambda one: id(one.work.job)):
            same = list(own)
            same[0].work.job.sink.deliver(*same)
            if same[0].work.job.streams and self._stages.streams is not None:
                self._stages.streams.ended(same[0].work.job)

    def _tell_text(self, unit: Unit, tokens: Sequence[int]) -> None:
        if self._stages.streams is not None:
            self._stages.streams.wrote(unit, tokens)


def _forward(adapter: Adapter, room: BatchQueue, simulated: str) -> Forward:
    """The forward of the adapter's device, or of the simulated device that `simulated` describes."""
    transfer = Transfer.to(adapter.pipe.device)
    if simulated:
        return SimulatedForward(adapter, room.limit_cost, transfer, service=ServiceTime.parse(simulated))
    return Forward(adapter, room.limit_cost, transfer)


def _stopped(service: Stoppable, end: float | None) -> bool:
    """Stop a service until `end`, in seconds of the monotonic clock; whether it has ended."""
    return service.stop(None if end is None else max(0.0, end - time.monotonic()))


def _bytes_of(units: list[Unit] | ItemError) -> int:
    """Bytes of an item's features, and of the context that is kept until the item is finished."""
    if isinstance(units, ItemError) or not units:
        return 0
    kept = getattr(units[0].assembly.context, "nbytes", 0)
    return sum([bytes_of(unit.features) for unit in units], kept)


def _all_stopped(works: Sequence[tuple[Work, int]]) -> bool:
    return all(work.job.stopped("decode") for work, _ in works)
