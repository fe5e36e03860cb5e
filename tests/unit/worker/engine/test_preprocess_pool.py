"""Preprocessing in real processes: the same results, and nothing lost or left over when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipefleet.contract.messages import JobItem
from pipefleet.errors import UsageError
from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine import process, processes
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.engine.device import Instruments
from pipefleet_workers.engine.engine import Engine, Stages
from pipefleet_workers.engine.process import SHARED, Answer, discard, packed, unpacked
from pipefleet_workers.engine.processes import PreprocessPool, _units
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Fetched, ItemError, JobContext, Work
from pipefleet_workers.models.load import load_pipeline
from pipefleet_workers.observe.metrics import Metrics
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.checkpoints.media import image
from tests.parity.half import in_dtype
from tests.parity.harness import Call, assert_same, load, on_the_wire

TEXTS, PICTURES = "text-classification", "image-classification"
SHARED_MEMORY = Path("/dev/shm")


def pool_of(task: str, adapter: Adapter, count: int = 1) -> PreprocessPool:
    return PreprocessPool.of(task, adapter, WorkerSettings(preprocess_processes=count))


@pytest.fixture(scope="module")
def texts() -> Iterator[tuple[Any, PreprocessPool]]:
    pipe = load(TEXTS)
    pool = pool_of(TEXTS, TextClassifier(pipe))
    pool.start()
    yield pipe, pool
    pool.stop()


def fetched(*calls: Call) -> list[Fetched]:
    job = JobContext("job", None, {}, 3, None, Outcomes(range(len(calls))))
    return [
        Fetched(Work(job, place, JobItem(str(place), None), dict(call.parameters), 1), on_the_wire(call.inputs))
        for place, call in enumerate(calls)
    ]


def children(pool: PreprocessPool) -> list[int]:
    return [child._process.pid for child in pool._children if child._process is not None]


def leftovers() -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob(f"pipefleet-{os.getpid()}-*")]


def served(adapter: Adapter, units: list[Any]) -> list[Any]:
    outputs = adapter.split(adapter.run(adapter.collate(units), units, UNOBSERVED), units)
    for unit, output in zip(units, outputs, strict=True):
        unit.assembly.collect(unit.index, output)
    return [adapter.finish(unit.assembly) for unit in units]


def test_units_are_those_of_the_adapter_and_failures_are_the_items_own(texts: Any) -> None:
    pipe, pool = texts
    adapter = TextClassifier(pipe)
    calls = [Call("a text"), Call(7), Call("another", {"top_k": 2}), Call("x", {"function_to_apply": "no such"})]
    prepared = pool.prepare(items := fetched(*calls))
    assert [one.failure.code if isinstance(one, ItemError) else "" for one in prepared] == [
        "", "bad_input", "", "bad_parameter",
    ]  # fmt: skip
    good = [index for index, one in enumerate(prepared) if not isinstance(one, ItemError)]
    units = [unit for index in good for unit in prepared[index]]
    assert [unit.assembly.work for unit in units] == [items[index].work for index in good]
    assert all(set(one.work.seconds) >= {"decode"} for one in items if one.inputs != 7)
    wanted = [pipe(calls[index].inputs, **{"top_k": 1, **calls[index].parameters}) for index in good]
    assert_same(served(adapter, units), wanted)


def test_a_process_that_is_killed_is_replaced_and_its_items_go_on(texts: Any) -> None:
    pool = texts[1]
    (before,) = children(pool)
    os.kill(before, signal.SIGKILL)
    (units,) = pool.prepare(fetched(Call("a text")))
    assert not isinstance(units, ItemError)
    assert children(pool) != [before]


def test_items_that_kill_two_processes_fail_by_name_and_the_next_ones_do_not(texts: Any) -> None:
    pool = texts[1]
    deadly = fetched(Call("a text"), Call("another"))
    deadly[0] = replace(deadly[0], inputs=_Deadly())
    codes = [one.failure.code if isinstance(one, ItemError) else "" for one in pool.prepare(deadly)]
    assert codes == ["internal_error"] * 2
    (units,) = pool.prepare(fetched(Call("a text")))
    assert not isinstance(units, ItemError)


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (11,)


def test_large_arrays_come_back_through_memory_that_is_given_back() -> None:
    value = {"a": torch.arange(1 << 16), "b": [np.ones(3), torch.ones(2, 3, dtype=torch.bfloat16), "text"]}
    name = f"pipefleet-{os.getpid()}-test"
    message = packed(value, name)
    assert message[2] == b""
    assert leftovers() == [name]
    found = unpacked(message, name)
    assert leftovers() == []
    assert torch.equal(found["a"], value["a"])
    assert torch.equal(found["b"][1], value["b"][1])
    found["a"][0] = 5  # is the receiver's own
    small = {"a": torch.ones(SHARED // 8)}
    assert torch.equal(unpacked(packed(small, name), name)["a"], small["a"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_has_room", lambda size: False)
        assert torch.equal(unpacked(packed(value, name), name)["a"], value["a"])
    packed(value, name)
    discard(name)
    discard(name)
    assert leftovers() == []


def test_pictures_go_through_the_engine_and_nothing_is_left_behind() -> None:
    pipe = load(PICTURES)
    adapter, settings = Adapter(pipe), WorkerSettings(preprocess_processes=1)
    pool = PreprocessPool.of(PICTURES, adapter, settings)
    stages = Stages(
        Fetcher(WorkerStore(), settings), Decoder(task_spec(PICTURES), settings, sampling_rate=None), adapter, pool
    )
    limits = BatchLimits(1 << 30, 8, 60.0)
    engine = Engine(
        stages, limits, settings, Instruments(Metrics("test")), slice_items=RUNTIME[PICTURES].sizing.slice_items
    )
    engine.start()
    pictures = [image(300 + index, 200, index) for index in range(9)]
    sink = Outcomes(range(10))
    job = JobContext("job", None, {}, 3, None, sink)
    inputs = [*(on_the_wire(picture) for picture in pictures), replace(on_the_wire(pictures[0]), content=b"no picture")]
    engine.admit([Work(job, place, JobItem(str(place), one), {}, 1) for place, one in enumerate(inputs)], bulk=False)
    sink.wait(120.0)
    assert sink.complete
    pids = children(pool)
    engine.stop()
    outcomes = sink.in_order()
    assert_same([one.output for one in outcomes[:9]], [pipe(picture) for picture in pictures])
    assert outcomes[9].failure is not None
    assert outcomes[9].failure.code == "bad_media"
    assert len(pids) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert leftovers() == []


def test_a_cancelled_job_costs_its_process_nothing(texts: Any) -> None:
    pipe, pool = texts
    settings = WorkerSettings(preprocess_processes=1)
    adapter = TextClassifier(pipe)
    stages = Stages(
        Fetcher(WorkerStore(), settings), Decoder(task_spec(TEXTS), settings, sampling_rate=None), adapter, pool
    )
    engine = Engine(stages, BatchLimits(64, 8), settings, Instruments(Metrics("test")), slice_items=4)
    sink = Outcomes(range(1))
    job = JobContext("job", None, {}, 3, None, sink, cancelled=True)
    engine._decode_and_prepare([Fetched(Work(job, 0, JobItem("0", "a"), {}, 1), "a")])
    assert [one.failure.code for one in sink.in_order() if one.failure] == ["cancelled"]


def test_a_task_that_needs_its_model_is_refused_in_one_sentence() -> None:
    adapter = RUNTIME["text-generation"].adapter(load("text-generation"))
    with pytest.raises(UsageError, match="text-generation is preprocessed beside its model"):
        pool_of("text-generation", adapter)


def test_a_process_that_cannot_start_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "serve", os._exit)
    pool = pool_of(TEXTS, TextClassifier(load(TEXTS)))
    with pytest.raises(UsageError, match="cannot start"):
        pool.start()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children(pool))


class _Endless:
    """Is never decoded: asked for what it is, it says nothing for ever."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        if multiprocessing.parent_process() is None:
            return _Endless
        while True:
            time.sleep(1)


def test_an_item_that_is_never_decoded_fails_alone_and_by_name(
    texts: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = texts[1]
    monkeypatch.setattr(pool._children[0], "_seconds", 5.0)
    (before,) = children(pool)
    items = fetched(Call("a text"), Call("never"), Call("another"))
    items[1] = replace(items[1], inputs=_Endless())
    prepared = pool.prepare(items)
    assert [one.failure.code if isinstance(one, ItemError) else "" for one in prepared] == ["", "internal_error", ""]
    assert [units[0].assembly.work.position for units in prepared if not isinstance(units, ItemError)] == [0, 2]
    assert "item 1 of job job: its process had not ended it within 5 s" in caplog.text
    assert children(pool) != [before]
    assert not _runs(before)
    assert leftovers() == []


def test_a_process_that_is_at_work_ends_with_its_parent() -> None:
    """The child is told to do what never ends; its parent, the script, is killed."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=Path.cwd()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30.0
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


PARENT = """
import threading
from tests.checkpoints.media import image
from tests.unit.worker.engine.test_preprocess_pool import PICTURES, Adapter, Call, _Endless, children, fetched, load
from tests.unit.worker.engine.test_preprocess_pool import pool_of, replace

def main():
    pool = pool_of(PICTURES, Adapter(load(PICTURES)))
    pool.start()
    (item,) = fetched(Call(image(40, 30, 1)))
    child = pool._children[0]
    says = child._says_something

    def said(pipe):
        found = says(pipe)
        print(child._process.pid, flush=True)
        return found

    child._says_something = said
    pool.prepare([replace(item, inputs=_Endless())])

if __name__ == "__main__":
    main()
"""


def test_warnings_come_back_with_the_units_or_the_failure() -> None:
    for failure in (None, ("bad_media", "no picture", "decode")):
        (one,) = fetched(Call("text"))
        _units(one, Answer((), None, 0, failure, {}, ["it is damaged"]))
        assert one.work.warnings == ["it is damaged"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_child_makes_inputs_in_the_dtype_of_the_model(dtype: str, tmp_path: Path) -> None:
    folder = in_dtype("image-classification", dtype, tmp_path / "model")
    pipe = load_pipeline(Pool("pictures", "image-classification", str(folder), device="cpu"))
    recipe = process.Recipe.of("image-classification", Adapter(pipe), WorkerSettings())
    assert recipe.adapter().pipe.dtype == getattr(torch, dtype)
