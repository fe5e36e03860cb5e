"""Several lanes of one device: batches run at once, every unit ends once, and the lanes share time, threads and memory."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipefleet.contract.messages import JobItem
from pipefleet.contract.records import JobFailure
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import FeatureExtractor
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.engine.device import Device, Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.lane import Sharing
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Assembly, JobContext, Unit, Work
from pipefleet_workers.models.lanes import Lanes, lanes_of
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.process.exit_codes import BROKEN_DEVICE, HUNG_FORWARD
from pipefleet_workers.process.torch_threads import torch_threads, use_torch_threads
from pipefleet_workers.process.watchdog import Watchdog
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.parity.harness import finished, load

DEADLINE = 30.0


class Toy:
    """An adapter that gives each unit its index; `inside` is called with the units of each forward."""

    pipe = None

    def __init__(self, inside: Callable[[Sequence[Unit], Progress], None] = lambda units, progress: None) -> None:
        self._inside = inside

    def excludes(self, units: Sequence[Unit]) -> bool:
        return name_of(units[0]) == "alone"

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        return {}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> list[int]:
        self._inside(units, progress)
        return [unit.index for unit in units]

    def split(self, outputs: list[int], units: Sequence[Unit]) -> list[int]:
        return outputs


class Bench:
    """A device with lanes, the items that it handed on, and what it said of its end."""

    def __init__(
        self, adapter: Any, *, together: int = 1, lanes: int | Lanes = 2, ahead: bool = False, **watched: Any
    ) -> None:
        self.room = BatchQueue(MicroBatcher(BatchLimits(100, together)), 1000)
        self.instruments = Instruments(Metrics("test"), on_fatal=self._fatal)
        self.watchdog = Watchdog(self._fatal, **watched)
        self.ended: list[Assembly] = []
        self.said: list[tuple[int, str]] = []
        self._changed = threading.Condition()
        self.device = Device(
            Forward(adapter, self.room.limit_cost),
            self.room,
            self.instruments,
            self._complete,
            watchdog=self.watchdog,
            timeout=DEADLINE,
            collate_ahead=ahead,
            lanes=Lanes(lanes) if isinstance(lanes, int) else lanes,
        )

    def wait(self, count: int) -> bool:
        """Whether so many items have ended in time."""
        return self.until(lambda: len(self.ended) >= count)

    def until(self, condition: Callable[[], Any]) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(condition, DEADLINE))

    def _complete(self, assemblies: Sequence[Assembly]) -> None:
        with self._changed:
            self.ended += assemblies
            self._changed.notify_all()

    def _fatal(self, code: int, reason: str) -> None:
        with self._changed:
            self.said.append((code, reason))
            self._changed.notify_all()


def job() -> JobContext:
    return JobContext("job", None, {}, 3, None, Outcomes(range(1)))


def item(name: str, units: int = 1, of: JobContext | None = None) -> list[Unit]:
    assembly = Assembly(Work(of or job(), 0, JobItem(name, ""), {}, 1), expected=units)
    return [Unit(assembly, index, name, 1, None) for index in range(units)]


def name_of(unit: Unit) -> str:
    return unit.assembly.work.item.id


@pytest.mark.parametrize("ahead", [False, True])
def test_two_batches_run_at_once_and_all_end_before_the_device_does(ahead: bool) -> None:
    both = threading.Barrier(2, timeout=DEADLINE)
    bench = Bench(Toy(lambda units, progress: both.wait() and None), ahead=ahead)
    for index in range(20):
        bench.room.put(item(str(index)))
    bench.device.start()
    assert bench.device.stop(DEADLINE), "what is in the room runs before the device ends"
    assert sorted(int(one.work.item.id) for one in bench.ended) == list(range(20))
    assert all(one.failure is None for one in bench.ended), "a forward that waits alone breaks the barrier"


@pytest.mark.parametrize("ahead", [False, True])
def test_no_batch_runs_beside_a_batch_that_excludes_others(ahead: bool) -> None:
    running: Counter[str] = Counter()
    beside: list[int] = []
    lock, short = threading.Lock(), threading.Event()

    def inside(units: Sequence[Unit], progress: Progress) -> None:
        name = name_of(units[0])
        with lock:
            running[name] += 1
            if name == "alone":
                beside.append(running.total() - 1)
        short.wait(0.002)  # the other lane may begin meanwhile
        with lock:
            running[name] -= 1

    bench = Bench(Toy(inside), ahead=ahead)
    names = ["alone", "other", "other"] * 20
    for name in names:
        bench.room.put(item(name))
    bench.device.start()
    bench.watchdog.start()
    assert bench.wait(len(names))
    assert beside == [0] * 20
    assert bench.device.stop(DEADLINE)
    bench.watchdog.stop(DEADLINE)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_item_with_units_in_both_lanes_ends_once(ahead: bool) -> None:
    both = threading.Barrier(2, timeout=DEADLINE)
    bench = Bench(Toy(lambda units, progress: both.wait() and None), ahead=ahead)
    bench.device.start()
    for index in range(200):
        bench.room.put(item(str(index), units=2))
    assert bench.device.stop(DEADLINE)
    assert Counter(one.work.item.id for one in bench.ended) == {str(index): 1 for index in range(200)}
    assert all(one.outputs == {0: 0, 1: 1} for one in bench.ended)


@pytest.mark.parametrize("ahead", [False, True])
def test_units_of_stopped_jobs_end_once_whichever_lane_finds_them(ahead: bool) -> None:
    bench = Bench(Toy(), together=3, lanes=4, ahead=ahead)
    stopped = job()
    stopped.cancelled = True
    for index in range(100):
        bench.room.put(item(f"live {index}"))
        bench.room.put(item(f"stopped {index}", units=2, of=stopped))
    bench.device.start()
    assert bench.device.stop(DEADLINE)
    assert len(bench.ended) == 200
    assert len({one.work.item.id for one in bench.ended}) == 200
    assert sum(one.failure is not None for one in bench.ended) == 100


def test_a_device_with_lanes_starts_again() -> None:
    bench = Bench(Toy())
    for count in (1, 2, 3):
        bench.device.start()
        bench.room.put(item(str(count)))
        assert bench.wait(count)
        assert bench.device.stop(DEADLINE)


def test_the_watchdog_names_the_item_of_the_lane_that_hangs() -> None:
    now = 0.0
    hung, go = threading.Event(), threading.Event()

    def hang(units: Sequence[Unit], progress: Progress) -> None:
        if name_of(units[0]) == "hung":
            hung.set()
            assert go.wait(DEADLINE)

    bench = Bench(Toy(hang), clock=lambda: now)
    bench.device.start()
    bench.room.put(item("hung"))
    assert hung.wait(DEADLINE)
    for count in range(1, 15):  # the other lane works, which is no sign of life of this lane
        bench.room.put(item(f"quick {count}"))
        assert bench.wait(count)
        now += DEADLINE / 10
        if not bench.watchdog.look():
            break
    go.set()
    assert bench.device.stop(DEADLINE)
    assert bench.said == [(HUNG_FORWARD, "stage forward has not ended item hung of job job within 30 s")]
    assert count > 9


def test_memory_that_runs_out_in_one_lane_halves_the_batch_there_and_loses_nothing() -> None:
    sizes: list[tuple[str, int]] = []
    both = threading.Barrier(2, timeout=DEADLINE)

    def small(units: Sequence[Unit], progress: Progress) -> None:
        sizes.append((str(units[0].key), len(units)))
        if len(units) == 8:
            both.wait()
        if units[0].key == "wide" and len(units) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    bench = Bench(Toy(small), together=8)
    bench.room.put(item("wide", units=8))
    bench.room.put(item("narrow", units=8))
    bench.device.start()
    assert bench.wait(2)
    assert [size for key, size in sizes if key == "narrow"] == [8], "the batch of the other lane keeps its size"
    sizes.clear()
    bench.room.put(item("wide", units=8))
    assert bench.device.stop(DEADLINE)
    assert sizes == [("wide", 2)] * 4, "later batches are smaller"
    assert len(bench.ended) == 3
    assert all(one.failure is None and one.outputs == {n: n for n in range(8)} for one in bench.ended)


def test_a_unit_that_lacks_the_memory_of_the_other_lane_runs_again_alone() -> None:
    inside, begun, tried, go = Counter[str](), threading.Event(), threading.Event(), threading.Event()

    def run(units: Sequence[Unit], progress: Progress) -> None:
        name = name_of(units[0])
        inside[name] += 1
        try:
            if name == "other":
                begun.set()
                assert go.wait(DEADLINE)
            elif inside["other"]:
                tried.set()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            inside[name] -= 1

    bench = Bench(Toy(run))
    bench.device.start()
    bench.room.put(item("other"))
    assert begun.wait(DEADLINE)
    bench.room.put(item("large"))
    assert tried.wait(DEADLINE)
    assert not bench.ended, "the large item waits for the other lane"
    go.set()
    assert bench.wait(2)
    assert bench.device.stop(DEADLINE)
    assert [one.work.item.id for one in bench.ended] == ["other", "large"]
    assert not any(one.failure for one in bench.ended)


def test_a_unit_that_does_not_fit_alone_fails_and_two_of_them_do_not_wait_for_each_other() -> None:
    def never(units: Sequence[Unit], progress: Progress) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    bench = Bench(Toy(never))
    for index in range(6):
        bench.room.put(item(str(index)))
    bench.device.start()
    assert bench.wait(6)
    assert bench.device.stop(DEADLINE)
    assert {one.failure.code for one in bench.ended if one.failure} == {"out_of_memory"}
    assert len(bench.ended) == 6


def test_a_device_that_breaks_in_one_lane_ends_the_process() -> None:
    def broken(units: Sequence[Unit], progress: Progress) -> None:
        if name_of(units[0]) == "bad":
            raise RuntimeError("CUDA error: device-side assert triggered")

    bench = Bench(Toy(broken))
    bench.device.start()
    bench.room.put(item("good"))
    bench.room.put(item("bad"))
    assert bench.until(lambda: bench.said)
    assert bench.said[0][0] == BROKEN_DEVICE
    assert "device-side assert" in bench.said[0][1]
    assert bench.device.stop(DEADLINE)


def test_lanes_share_the_seconds_of_their_device() -> None:
    now = 0.0
    sharing = Sharing(lambda: now)
    first = sharing.begin()
    now = 1.0  # the first alone
    second = sharing.begin()
    now = 3.0  # both
    assert sharing.end(first) == pytest.approx(2.0)
    now = 4.0  # the second alone
    assert sharing.end(second) == pytest.approx(2.0)
    now = 10.0  # none
    third = sharing.begin()
    now = 10.5
    assert sharing.end(third) == pytest.approx(0.5)


def test_the_busy_seconds_of_a_device_are_never_more_than_the_time_that_passed() -> None:
    both = threading.Barrier(2, timeout=DEADLINE)
    bench = Bench(Toy(lambda units, progress: both.wait() and None))
    for index in range(50):
        bench.room.put(item(str(index)))
    begin = bench.device._sharing._now()
    bench.device.start()
    assert bench.device.stop(DEADLINE)
    passed = bench.device._sharing._now() - begin
    assert 0 < bench.instruments.metrics.totals().busy <= passed
    lanes = [f"{lane}" for lane in range(2)]
    read = bench.instruments.metrics.registry.get_sample_value
    seconds = [read("pipefleet_lane_busy_seconds_total", {"pool": "test", "lane": lane}) for lane in lanes]
    assert all(seconds), "each lane says how long it ran"


def test_a_thread_sets_its_own_number_of_torch_threads() -> None:
    before = torch_threads()
    found: list[int] = []
    set_here, set_there = threading.Event(), threading.Event()

    def here() -> None:
        use_torch_threads(before + 1)
        set_here.set()
        assert set_there.wait(DEADLINE)
        found.append(torch_threads())

    def there() -> None:
        assert set_here.wait(DEADLINE)
        use_torch_threads(before + 2)
        set_there.set()

    threads = [threading.Thread(target=target) for target in (here, there)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert found == [before + 1]
    assert torch_threads() == before
    use_torch_threads(before)  # later threads begin with the number that was set last


def test_two_lanes_give_the_bytes_of_one() -> None:
    pipe = load("feature-extraction")
    texts = [" ".join(["sea", "of", "trees", "wide", "old"][: 1 + index % 5] * (1 + index % 7)) for index in range(60)]
    one, two = (embedded(pipe, texts, lanes) for lanes in (1, 2))
    for mine, other in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, other)


def embedded(pipe: Any, texts: list[str], lanes: int) -> list[Any]:
    """The outputs of texts that each run in a batch of their own."""
    settings = WorkerSettings()
    decoder = Decoder(task_spec("feature-extraction"), settings, sampling_rate=None)
    stages = Stages(Fetcher(WorkerStore(), settings), decoder, FeatureExtractor(pipe))
    shared = lanes_of(torch.device("cpu"), lanes)
    engine = Engine(stages, BatchLimits(1, 1), settings, Instruments(Metrics("test")), slice_items=4, lanes=shared)
    sink = Outcomes(range(len(texts)))
    context = JobContext("job", None, {}, 3, None, sink)
    engine.start()
    works = [Work(context, n, JobItem(str(n), text), {}, 1, fetches=False) for n, text in enumerate(texts)]
    engine.admit(works, bulk=True)
    outcomes = finished(sink)
    assert engine.stop(DEADLINE)
    assert not any(one.failure for one in outcomes)
    return [one.output for one in outcomes]


def test_a_failure_of_one_lane_is_the_failure_of_its_unit_alone() -> None:
    def picky(units: Sequence[Unit], progress: Progress) -> None:
        if any(name_of(unit) == "bad" for unit in units):
            raise RuntimeError("not this one")

    bench = Bench(Toy(picky), together=4)
    for index in range(30):
        bench.room.put(item("bad" if index % 10 == 0 else str(index)))
    bench.device.start()
    assert bench.device.stop(DEADLINE)
    failed = [one for one in bench.ended if isinstance(one.failure, JobFailure)]
    assert [one.work.item.id for one in failed] == ["bad"] * 3
    assert len(bench.ended) == 30


def test_a_batch_alone_on_the_device_takes_all_torch_threads() -> None:
    taken: dict[str, int] = {}
    begun, go = threading.Event(), threading.Event()

    def note(units: Sequence[Unit], progress: Progress) -> None:
        taken[name_of(units[0])] = torch_threads()
        if name_of(units[0]) == "first":
            begun.set()
            assert go.wait(DEADLINE)

    bench = Bench(Toy(note))
    for lane in bench.device._lanes:
        lane._plan = Lanes(2, threads=1, alone=2)
    before = torch_threads()
    bench.device.start()
    bench.room.put(item("first"))
    assert begun.wait(DEADLINE)
    bench.room.put(item("second"))
    assert bench.wait(1)
    go.set()
    assert bench.device.stop(DEADLINE)
    use_torch_threads(before)
    assert taken == {"first": 2, "second": 1}


def test_a_small_batch_takes_one_torch_thread_also_where_it_is_alone() -> None:
    taken: list[int] = []
    bench = Bench(Toy(lambda units, progress: taken.append(torch_threads())), lanes=Lanes(1, 2, 2, one_thread=1))
    before = torch_threads()
    bench.room.put(item("small"))
    bench.room.put([replace(one, length=2) for one in item("larger")])
    bench.device.start()
    assert bench.device.stop(DEADLINE)
    use_torch_threads(before)
    assert sorted(taken) == [1, 2]


def test_while_a_small_batch_runs_units_gather_and_then_run_together() -> None:
    begun, go = threading.Event(), threading.Event()
    batches: list[list[str]] = []

    def note(units: Sequence[Unit], progress: Progress) -> None:
        batches.append([name_of(unit) for unit in units])
        if batches == [["first"]]:
            begun.set()
            assert go.wait(DEADLINE)

    bench = Bench(Toy(note), together=10, lanes=Lanes(2, 1, 2, one_thread=5))
    bench.device.start()
    bench.room.put(item("first"))
    assert begun.wait(DEADLINE)
    for _ in range(3):
        bench.room.put(item("next"))
    assert len(bench.room) == 3, "the other lane takes none of them"
    go.set()
    assert bench.wait(4)
    assert bench.device.stop(DEADLINE)
    assert batches == [["first"], ["next"] * 3]


def test_beside_a_large_batch_a_small_one_begins_at_once() -> None:
    go = threading.Event()
    bench = Bench(
        Toy(lambda units, progress: go.wait(DEADLINE) if units[0].length > 5 else None),
        lanes=Lanes(2, 1, 2, one_thread=5),
    )
    bench.device.start()
    bench.room.put([replace(one, length=6) for one in item("large")])
    bench.room.put(item("small"))
    assert bench.wait(1)
    assert bench.ended[0].work.item.id == "small"
    go.set()
    assert bench.device.stop(DEADLINE)
