"""Work that never ends, in each stage: the engine ends its process and says which item it was; whoever only waits is left alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit
from pipefleet_workers.models.warmup import warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from pipefleet_workers.process.exit_codes import HUNG_FORWARD, HUNG_STAGE
from pipefleet_workers.process.watchdog import LOOKS, watched
from pipefleet_workers.results import lines
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.parity.harness import SECONDS, Call, finished, load, recording, running

TASK = "text-classification"
SETTINGS = {"stage_timeout": 2.0, "forward_timeout": 2.0, "cpu_threads": 1}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


class Ends:
    """What the process would have ended with; then what hung goes on."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.said: list[tuple[int, str]] = []

    def __call__(self, code: int, reason: str) -> None:
        self.said.append((code, reason))
        self.go.set()

    def hang(self, text: Any) -> None:
        if "hang" in str(text):
            assert self.go.wait(SECONDS), "nobody found out"


class HangsInPreprocess(TextClassifier):
    ends: Ends

    def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
        return Adapter.prepare(self, decoded)

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        self.ends.hang(decoded.value)
        (units,) = TextClassifier.prepare(self, [decoded])
        assert not isinstance(units, ItemError)
        return units


class HangsInCollate(TextClassifier):
    ends: Ends

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        self.ends.hang([unit.assembly.work.item.inputs for unit in units])
        return super().collate(units)


class HangsInPostprocess(TextClassifier):
    ends: Ends

    def finish(self, assembly: Assembly) -> Any:
        self.ends.hang(assembly.work.item.inputs)
        return super().finish(assembly)


@pytest.mark.parametrize(
    ("adapter", "code", "stage"),
    [
        (HangsInPreprocess, HUNG_STAGE, "cpu"),
        (HangsInCollate, HUNG_FORWARD, "forward"),
        (HangsInPostprocess, HUNG_STAGE, "finish"),
    ],
)
def test_a_hanging_item_ends_the_process_by_name(pipe: Any, adapter: type[Any], code: int, stage: str) -> None:
    ends = Ends()
    hanging = recording(adapter, pipe)
    hanging.ends = ends
    limits = BatchLimits(1 << 20, 1)
    with running(hanging, TASK, limits=limits, settings=WorkerSettings(**SETTINGS), on_fatal=ends) as engine:
        outcomes = engine.run([Call("fine"), Call("this will hang"), Call("fine too")])
    assert ends.said == [(code, f"stage {stage} has not ended item 1 of job job within 2 s")]
    assert [one.failure for one in outcomes] == [None] * 3


def test_a_codec_that_loops_ends_the_process_by_name(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Ends()
    with running(recording(TextClassifier, pipe), TASK, settings=WorkerSettings(**SETTINGS), on_fatal=ends) as engine:
        decode = engine.engine._stages.decoder.decode

        def looping(fetched: Any) -> Decoded:
            ends.hang(fetched.inputs)
            return decode(fetched)

        monkeypatch.setattr(engine.engine._stages.decoder, "decode", looping)
        monkeypatch.setattr(engine.engine._stages.decoder, "texts", lambda fetched: None)  # as for media
        finished(engine.submit([Call("fine"), Call("fine too"), Call("this will hang")], id="of-three")[1])
    assert ends.said == [(HUNG_STAGE, "stage cpu has not ended item 2 of job of-three within 2 s")]


class Large(TextClassifier):
    """Its results are arrays, which are stored as objects."""

    def finish(self, assembly: Assembly) -> Any:
        super().finish(assembly)
        return {"array": np.zeros(1 << 15, np.float32)}


class Nowhere(WorkerStore):
    """Takes what is stored once `go` is set."""

    def __init__(self, go: threading.Event) -> None:
        super().__init__()
        self.go, self.asked = go, threading.Event()

    def put(self, uri: str, body: bytes, *, content_type: str) -> None:
        self.asked.set()
        assert self.go.wait(SECONDS), "the test never let it go"


def test_an_encoder_of_artifacts_that_loops_ends_the_process_by_name(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, encode = Ends(), lines._content
    adapter, settings = recording(Large, pipe), WorkerSettings(**SETTINGS, store_threads=1)
    store = Nowhere(ends.go)
    store.go.set()
    monkeypatch.setattr(lines, "_content", lambda artifact: (ends.hang("hang"), encode(artifact))[1])
    ends.go = threading.Event()
    results = lines.ResultWriter(store, "s3://bucket")
    with running(adapter, TASK, settings=settings, results=results, on_fatal=ends) as engine:
        finished(engine.submit([Call("text")], id="large")[1])
    assert ends.said == [(HUNG_STAGE, "stage store has not ended item 0 of job large within 2 s")]


def test_a_store_that_takes_its_time_is_not_hung(pipe: Any) -> None:
    ends = Ends()
    store, settings = Nowhere(threading.Event()), WorkerSettings(**SETTINGS, store_threads=1)
    results = lines.ResultWriter(store, "s3://bucket")
    with running(recording(Large, pipe), TASK, settings=settings, results=results, on_fatal=ends) as engine:
        sink = engine.submit([Call("text")])[1]
        assert store.asked.wait(SECONDS)
        assert not ends.go.wait(1.5 * SETTINGS["stage_timeout"])
        store.go.set()
        finished(sink)
    assert ends.said == []


def test_stages_that_wait_for_room_are_not_hung(pipe: Any) -> None:
    """Every room is full behind a forward that is held; what waits longer than an item may take is no item that hangs."""
    ends = Ends()
    adapter = recording(TextClassifier, pipe)
    settings = WorkerSettings(stage_timeout=2.0, cpu_threads=1, fetch_threads=1, window_units=1)
    with running(adapter, TASK, limits=BatchLimits(1, 1), settings=settings, on_fatal=ends) as engine:
        adapter.gate.clear()
        sinks: list[Any] = []

        def client() -> None:
            sinks.extend(engine.submit([Call(f"text {index}")], id=str(index))[1] for index in range(40))

        thread = threading.Thread(target=client, daemon=True)
        thread.start()
        assert adapter.entered.wait(SECONDS)
        looks = Looks(engine.engine._watchdog, LOOKS + 5)
        assert looks.reached.wait(SECONDS)
        adapter.gate.set()
        thread.join(SECONDS)
        assert [finished(sink)[0].failure for sink in sinks] == [None] * 40
    assert ends.said == []


class Looks:
    """Counts the looks of a watchdog."""

    def __init__(self, watchdog: Any, wanted: int) -> None:
        self.reached = threading.Event()
        self._look, self._left = watchdog.look, wanted
        watchdog.look = self

    def __call__(self) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.reached.set()
        return bool(self._look())


def test_an_engine_that_stops_ends_its_watchdog(pipe: Any) -> None:
    with running(recording(TextClassifier, pipe), TASK) as engine:
        engine.run([Call("a")])
        watchdog = engine.engine._watchdog
        assert not watchdog.join(0.0)
    assert watchdog.join(0.0)


def test_a_warm_up_that_never_ends_ends_the_process(pipe: Any) -> None:
    ends = Ends()

    class Hanging(TextClassifier):
        def run(self, inputs: Any, units: Sequence[Unit], progress: Progress) -> list[Any]:
            assert ends.go.wait(SECONDS)
            return super().run(inputs, units, progress)

    def told(code: int, reason: str) -> None:
        ends(code, reason)
        ends.go.set()

    with watched("warm-up", 1.0, HUNG_FORWARD, told):
        warm_up(Hanging(pipe), task_spec(TASK), {}, ServiceFit(), 1024)
    assert ends.said == [(HUNG_FORWARD, "stage warm-up has not ended what it began within 1 s")]
