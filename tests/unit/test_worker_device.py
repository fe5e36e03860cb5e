"""The device with a thread that collates ahead: an item whose units end in two threads ends once."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from pipefleet.contract.messages import JobItem
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.engine.device import Device, Instruments
from pipefleet_workers.items import Assembly, Batch, JobContext, Unit, Work
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.process.watchdog import Watchdog

DEADLINE = 30.0
MEETING_SECONDS = 1.0


class Outputs(dict[int, Any]):
    """Lets each of two threads note its unit before either of them counts, where both are let in at once."""

    def __init__(self) -> None:
        super().__init__()
        self.meeting = threading.Barrier(2)

    def __len__(self) -> int:
        with suppress(threading.BrokenBarrierError):
            self.meeting.wait(MEETING_SECONDS)
        return super().__len__()


class Held:
    """A forward whose first batch ends when it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def collate(self, batch: Batch) -> None:
        return None

    def run(self, batch: Batch, staged: None) -> list[tuple[Unit, Any]]:
        self.begun.set()
        assert self.go.wait(DEADLINE)
        return [(unit, unit.index) for unit in batch.units]


class Stopping(JobContext):
    """A job that is cancelled once its first unit runs; the first to hear of it lets the forward end."""

    forward: Held

    def stopped(self, stage: str) -> Any:
        failure = super().stopped(stage)
        if failure is not None:
            self.forward.go.set()
        return failure


def test_an_item_with_a_unit_in_each_thread_ends_once() -> None:
    forward = Held()
    room = BatchQueue(MicroBatcher(BatchLimits(100, 1)), 10)
    instruments = Instruments(Metrics("test"))
    ended: list[Assembly] = []
    device = Device(
        forward,  # type: ignore[arg-type]
        room,
        instruments,
        ended.extend,
        watchdog=Watchdog(instruments.on_fatal),
        timeout=DEADLINE,
        collate_ahead=True,
    )
    job = Stopping("job", None, {}, 3, None, Outcomes(range(1)))
    job.forward = forward
    assembly = Assembly(Work(job, 0, JobItem("a", ""), {}, 1), expected=2, outputs=Outputs())
    device.start()
    room.put([Unit(assembly, 0, "key", 2, None)])
    assert forward.begun.wait(DEADLINE)
    job.cancelled = True  # the second unit is dropped by the collating thread while the first one runs
    room.put([Unit(assembly, 1, "key", 1, None)])
    room.close()
    device.join()
    assert len(ended) == 1
    assert assembly.failure is not None
    assert assembly.failure.code == "cancelled"
