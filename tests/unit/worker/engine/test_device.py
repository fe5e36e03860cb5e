"""The device: schedule, execute, update. Each unit ends once, in the device's thread, and what is aborted waits for no forward."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.engine.device import Device, Instruments
from pipefleet_workers.engine.step import Step, Update
from pipefleet_workers.items import Assembly, Batch, JobContext, Unit, Work
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.process.watchdog import Watchdog

DEADLINE = 30.0


class Forward:
    """A forward that does as it is told by `inside`, which it calls with its batch, and gives each unit's index."""

    def __init__(self, inside: Any = lambda batch, progress: None) -> None:
        self._inside = inside
        self.batches: list[Batch] = []

    def collate(self, batch: Batch) -> None:
        return None

    def run(self, batch: Batch, progress: Progress, staged: None) -> list[tuple[Unit, Any]]:
        self.batches.append(batch)
        self._inside(batch, progress)
        return [(unit, unit.index) for unit in batch.units]


class Outputs(dict[int, Any]):
    """Notes the threads that note the outputs of an item."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def __setitem__(self, index: int, output: Any) -> None:
        self.threads.append(threading.current_thread().name)
        super().__setitem__(index, output)


class Ended:
    """What a device has handed on."""

    def __init__(self) -> None:
        self.assemblies: list[Assembly] = []
        self._changed = threading.Condition()

    def __call__(self, assemblies: Sequence[Assembly]) -> None:
        with self._changed:
            self.assemblies += assemblies
            self._changed.notify_all()

    def wait(self, count: int) -> bool:
        """Whether so many items have ended in time."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.assemblies) >= count, DEADLINE)


def job() -> JobContext:
    return JobContext("job", None, {}, 3, None, Outcomes(range(1)))


def item(of: JobContext, units: int = 1) -> list[Unit]:
    """The units of one item, the first the longest."""
    assembly = Assembly(Work(of, 0, JobItem("a", ""), {}, 1), expected=units, outputs=Outputs())
    return [Unit(assembly, index, "key", units - index, None) for index in range(units)]


def device(forward: Any, ended: Ended, *, together: int = 1, ahead: bool = True) -> tuple[Device, BatchQueue]:
    room = BatchQueue(MicroBatcher(BatchLimits(100, together)), 10)
    instruments = Instruments(Metrics("test"))
    watchdog = Watchdog(instruments.on_fatal)
    return Device(forward, room, instruments, ended, watchdog=watchdog, timeout=DEADLINE, collate_ahead=ahead), room


def test_an_item_whose_units_run_and_are_aborted_ends_once_in_the_devices_thread() -> None:
    begun, go = threading.Event(), threading.Event()

    def hold(batch: Batch, progress: Progress) -> None:
        begun.set()
        assert go.wait(DEADLINE)

    class Stopping(JobContext):
        """The first to hear that the job is cancelled lets the forward end."""

        def stopped(self, stage: str) -> Any:
            failure = super().stopped(stage)
            if failure is not None:
                go.set()
            return failure

    ended = Ended()
    one, room = device(Forward(hold), ended)
    of = Stopping("job", None, {}, 3, None, Outcomes(range(1)))
    first, second = item(of, 2)
    one.start()
    room.put([first])
    assert begun.wait(DEADLINE)
    of.cancelled = True  # the thread that collates hears it while the first unit runs
    room.put([second])
    assert one.stop(DEADLINE)
    (assembly,) = ended.assemblies
    assert assembly.failure is not None
    assert assembly.failure.code == "cancelled"
    assert assembly.outputs.threads == ["device", "device"]  # type: ignore[attr-defined]


def test_what_is_aborted_ends_at_the_next_step_of_the_batch_that_runs() -> None:
    begun, scheduled, ended = threading.Event(), threading.Event(), Ended()

    def long(batch: Batch, progress: Progress) -> None:
        begun.set()
        assert scheduled.wait(DEADLINE)
        while not ended.assemblies:
            progress.tick()

    class Cancelled(JobContext):
        def stopped(self, stage: str) -> Any:
            scheduled.set()
            return super().stopped(stage)

    one, room = device(Forward(long), ended)
    one.start()
    room.put(item(job()))
    assert begun.wait(DEADLINE)
    room.put(item(Cancelled("late", None, {}, 3, None, Outcomes(range(1)), cancelled=True)))
    assert ended.wait(1), "the forward never ends unless a tick hands on the aborted item"
    assert one.stop(DEADLINE)
    assert [assembly.work.job.id for assembly in ended.assemblies] == ["late", "job"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_of_stopped_jobs_never_runs(ahead: bool) -> None:
    forward, ended = Forward(), Ended()
    one, room = device(forward, ended, together=3, ahead=ahead)
    stopped = job()
    stopped.cancelled = True
    room.put([*item(stopped), *item(stopped), *item(job())])
    room.put(item(stopped))
    one.start()
    assert ended.wait(4)
    assert one.stop(DEADLINE)
    assert [len(batch.units) for batch in forward.batches] == [1]
    assert sorted(bool(one.failure) for one in ended.assemblies) == [False, True, True, True]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_released_is_handed_on_before_its_batch_ends(ahead: bool) -> None:
    ended = Ended()

    def release(batch: Batch, progress: Progress) -> None:
        progress.release(batch.units[1], "early")
        assert [one.outputs for one in ended.assemblies] == [{0: "early"}]
        assert [progress.remains(unit) for unit in batch.units] == [True, False, True]

    one, room = device(Forward(release), ended, together=3, ahead=ahead)
    room.put([unit for _ in range(3) for unit in item(job())])
    one.start()
    assert ended.wait(3)
    assert one.stop(DEADLINE)
    assert [one.outputs for one in ended.assemblies] == [{0: "early"}, {0: 0}, {0: 0}]


def test_the_updates_of_a_step_say_what_ended_and_what_remains() -> None:
    updates: list[Update] = []
    units = [unit for _ in range(3) for unit in item(job())]
    step = Step(Batch("key", units), lambda: None, updates.append)
    failure = JobFailure("model_error", "no", "forward")
    step.release(units[2], "early")
    step.end([(units[0], "a"), (units[1], failure), (units[2], "dropped")])
    first, last = updates
    assert (first.ended, first.remaining) == ([(units[2], "early")], units[:2])
    assert (last.ended, last.remaining) == ([(units[0], "a"), (units[1], failure)], [])
    assert first.scheduled == last.scheduled == units


@pytest.mark.parametrize("ahead", [False, True])
def test_a_device_starts_and_stops_in_any_order(ahead: bool) -> None:
    ended = Ended()
    one, room = device(Forward(), ended, ahead=ahead)
    assert one.stop(DEADLINE), "it has not run yet"
    for count in (1, 2):
        one.start()
        one.start()
        room.put(item(job()))
        assert one.stop(DEADLINE)
        assert one.stop(DEADLINE)
        assert len(ended.assemblies) == count, "what is in the room runs before the device ends"


def test_an_error_of_the_device_itself_is_told() -> None:
    said: list[tuple[int, str]] = []
    told = threading.Event()

    def fatal(code: int, reason: str) -> None:
        said.append((code, reason))
        told.set()

    def broken(batch: Batch, progress: Progress) -> None:
        raise SystemError("no device")

    room = BatchQueue(MicroBatcher(BatchLimits(100, 1)), 10)
    instruments = Instruments(Metrics("test"), on_fatal=fatal)
    one = Device(
        Forward(broken),  # type: ignore[arg-type]
        room,
        instruments,
        Ended(),
        watchdog=Watchdog(fatal),
        timeout=DEADLINE,
        collate_ahead=False,
    )
    one.start()
    room.put(item(job()))
    assert told.wait(DEADLINE)
    assert one.stop(DEADLINE)
    assert [reason for _, reason in said] == ["the device's thread ended: SystemError: no device"]
