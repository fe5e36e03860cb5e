"""Inputs copied ahead of their forward: every result is right, whatever fails on the way, and nothing is held or changed.

The link here is a GPU's in all but the hardware: what it copies holds nothing before the device's thread has joined.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pipefleet.contract.messages import JobItem
from pipefleet_workers.adapters.progress import UNOBSERVED, Progress
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.batch_queue import BatchQueue
from pipefleet_workers.engine.batcher import BatchLimits, MicroBatcher
from pipefleet_workers.engine.device import Device, Instruments
from pipefleet_workers.engine.forward import Forward
from pipefleet_workers.engine.transfer import Staged, Transfer, map_tensors
from pipefleet_workers.items import Assembly, Batch, Decoded, JobContext, Unit, Work
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.process.watchdog import Watchdog
from tests.parity.harness import SECONDS, assert_same, load

Pair = namedtuple("Pair", "left right")
TEXTS = [f"text {index} {'word ' * (index % 5)}" for index in range(24)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load("text-classification")


class FakeLink:
    """A copy arrives at `join` and not before; `fails` are the numbers of the copies that are out of memory."""

    def __init__(self, fails: Sequence[int] = ()) -> None:
        self._fails = fails
        self._under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.copies = 0
        self.threads: dict[str, set[str]] = {"copy": set(), "join": set()}

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        self.copies += 1
        self.threads["copy"].add(threading.current_thread().name)
        if self.copies in self._fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        there = torch.full_like(tensor, 7)
        self._under_way.append((there, tensor.clone()))
        return there

    def mark(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        mark, self._under_way = self._under_way, []
        return mark

    def join(self, mark: Any, tensors: list[torch.Tensor]) -> None:
        self.threads["join"].add(threading.current_thread().name)
        assert {id(there) for there, _ in mark} >= {id(one) for one in tensors}
        for there, content in mark:
            there.copy_(content)


class Recording(TextClassifier):
    """Notes the threads and sizes of its batches."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.sizes: list[int] = []

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        self.sizes.append(len(units))
        return super().run(inputs, units, progress)


def units_of(adapter: TextClassifier, texts: Sequence[str]) -> list[Unit]:
    job = JobContext("job", None, {}, 3, None, Outcomes(range(len(texts))))
    works = [Work(job, position, JobItem(str(position), text), {}, 1) for position, text in enumerate(texts)]
    prepared = adapter.prepare([Decoded(work, work.item.inputs) for work in works])
    return [unit for units in prepared if isinstance(units, list) for unit in units]


def through_a_device(adapter: TextClassifier, link: FakeLink, texts: Sequence[str] = TEXTS) -> list[Any]:
    """The results of all texts in order, or their failures, by a device that collates ahead in batches of four."""
    room = BatchQueue(MicroBatcher(BatchLimits(1 << 20, 4)), 4096)
    ended: dict[int, Assembly] = {}
    complete = threading.Event()

    def note(assemblies: Sequence[Assembly]) -> None:
        ended.update({one.work.position: one for one in assemblies})
        if len(ended) == len(texts):
            complete.set()

    forward = Forward(adapter, room.limit_cost, Transfer(link))
    instruments = Instruments(Metrics("test"))
    watchdog = Watchdog(instruments.on_fatal)
    device = Device(forward, room, instruments, note, watchdog=watchdog, timeout=SECONDS, collate_ahead=True)
    room.put(units_of(adapter, texts))
    device.start()
    assert complete.wait(SECONDS)
    assert device.stop(SECONDS)
    return [ended[index].failure or adapter.finish(ended[index]) for index in range(len(texts))]


def test_batches_are_copied_by_the_thread_beside_the_device_and_waited_for_by_its_own(pipe: Any) -> None:
    adapter, link = Recording(pipe), FakeLink()
    results = through_a_device(adapter, link)
    assert_same(results, [pipe(text) for text in TEXTS])
    assert adapter.sizes == [4] * 6
    assert link.threads == {"copy": {"collate"}, "join": {"device"}}
    assert link.copies == 6 * len(units_of(adapter, ["a"])[0].features)


def test_no_memory_for_a_copy_leaves_the_batch_on_the_host(pipe: Any) -> None:
    adapter, link = Recording(pipe), FakeLink(fails=[1, 5, 6])
    results = through_a_device(adapter, link)
    assert_same(results, [pipe(text) for text in TEXTS])
    assert adapter.sizes == [4] * 6, "the batches are whole: nothing failed on the device"


def test_an_error_that_is_not_the_devices_own_is_found_by_the_forward(pipe: Any) -> None:
    class Faulty(Recording):
        def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
            if any("text 9" in unit.assembly.work.item.inputs for unit in units):
                raise ValueError("no such tensor")
            return super().collate(units)

    results = through_a_device(Faulty(pipe), FakeLink())
    assert results[9].code == "model_error"
    assert_same([*results[:9], *results[10:]], [pipe(text) for text in (*TEXTS[:9], *TEXTS[10:])])


def test_a_staged_batch_that_is_out_of_memory_lets_go_of_its_inputs_before_it_runs_again(pipe: Any) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    class Small(Recording):
        def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
            held.append(sum(one() is not None for one in seen))
            seen.append(weakref.ref(inputs["input_ids"]))
            if len(units) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().run(inputs, units, progress)

    adapter = Small(pipe)
    transfer = Transfer(FakeLink())
    costs: list[int] = []
    forward = Forward(adapter, costs.append, transfer)
    batch = Batch("key", units_of(adapter, TEXTS[:4]))
    staged = forward.collate(batch)
    assert staged is not None
    outputs = forward.run(batch, UNOBSERVED, staged)
    assert [adapter.finish(done(unit, output)) for unit, output in outputs] == [pipe(text) for text in TEXTS[:4]]
    assert adapter.sizes == [2, 2]
    assert held == [0, 0, 0], "inputs of an earlier try are still in memory"
    assert costs == [batch.cost // 2]


def done(unit: Unit, output: Any) -> Assembly:
    assert unit.assembly.collect(unit.index, output)
    return unit.assembly


def test_the_tensors_of_units_stay_as_they_are() -> None:
    own = torch.arange(6)
    transfer = Transfer(FakeLink())
    staged = transfer.begin({"pixel_values": own, "sizes": [own, (3, own)], "is_last": True})
    inputs = transfer.finish(staged)
    inputs["pixel_values"].zero_()
    assert own.tolist() == [0, 1, 2, 3, 4, 5]
    assert inputs["sizes"][1][1].tolist() == own.tolist()
    assert inputs["is_last"] is True
    assert staged.inputs is None


def test_without_a_link_the_inputs_are_the_adapters_own() -> None:
    inputs = {"a": torch.ones(2)}
    transfer = Transfer.to(torch.device("cpu"))
    assert transfer.finish(transfer.begin(inputs)) is inputs
    assert transfer.finish(Staged(inputs)) is inputs


def test_containers_keep_their_types() -> None:
    one = torch.ones(2)
    value = OrderedDict(a=[one, "b"], c=Pair(one, None), d=(one, [one]), e=3.5)
    found = map_tensors(value, lambda tensor: tensor + 1)
    assert type(found) is OrderedDict
    assert list(found) == ["a", "c", "d", "e"]
    assert type(found["c"]) is Pair
    assert found["a"][1] == "b"
    assert found["c"].left.tolist() == found["d"][1][0].tolist() == [2.0, 2.0]
    assert value["a"][0] is one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_link_copies_what_the_host_holds() -> None:
    inputs = {"ids": torch.arange(1 << 20), "rows": [torch.ones(3), "text"]}
    transfer = Transfer.to(torch.device("cuda:0"))
    found = transfer.finish(transfer.begin(inputs))
    assert found["ids"].device.type == "cuda"
    assert torch.equal(found["ids"].cpu(), inputs["ids"])
    assert not inputs["ids"].is_pinned()
