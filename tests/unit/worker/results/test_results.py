"""Results on their way out of the engine: stored side by side within the budget of bytes, the same objects, each on its own."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from PIL import Image

from pipefleet.contract.artifacts import resolve
from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import Shard
from pipefleet.contract.references import StorageRef
from pipefleet.errors import AccessDeniedError, ServiceUnavailableError
from pipefleet_workers.adapters.text.encoder import TextClassifier
from pipefleet_workers.engine.batcher import BatchLimits
from pipefleet_workers.items import Assembly, Audio, Encoded, Outcome, Unit
from pipefleet_workers.results.artifacts import INLINE_NUMBERS
from pipefleet_workers.results.lines import ResultWriter
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from tests.parity.harness import SECONDS, Call, Running, finished, load, recording, running, wait_until

TASK = "text-classification"
BYTES = 2 << 20
BUDGET = 8 << 20
NUMBERS = BYTES // 4


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load(TASK)


@pytest.fixture
def shard(environment: dict[str, str]) -> Shard:
    run = f"s3://pipefleet/results/{uuid.uuid4().hex}/"
    return Shard("run", run, RunLayout(run).shard(3), 3, 40, 9)


class Living:
    """Counts arrays that are still referred to by anybody."""

    def __init__(self) -> None:
        self.now = self.most = self.made = 0
        self._lock = threading.Lock()

    def array(self) -> np.ndarray[Any, Any]:
        """A new array of BYTES."""
        array = np.zeros(NUMBERS, np.float32)
        with self._lock:
            self.now, self.made = self.now + 1, self.made + 1
            self.most = max(self.most, self.now)
        weakref.finalize(array, self._gone)
        return array

    def _gone(self) -> None:
        with self._lock:
            self.now -= 1


class Making(TextClassifier):
    """Its results are made by `make`, of the text of the item."""

    make: Callable[[str], Any] = staticmethod(lambda _: None)

    def finish(self, assembly: Assembly) -> Any:
        super().finish(assembly)
        return self.make(str(assembly.work.item.inputs))


class Store(WorkerStore):
    """The real store behind a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.stored: list[str] = []
        self.inside = 0
        self._count = threading.Lock()

    def put(self, uri: str, body: bytes, *, content_type: str) -> None:
        with self._count:
            self.inside += 1
        assert self.gate.wait(SECONDS), "the test never opened the gate"
        super().put(uri, body, content_type=content_type)
        with self._count:
            self.inside -= 1
            self.stored.append(uri)


def making(pipe: Any, make: Callable[[str], Any]) -> Any:
    adapter = recording(Making, pipe)
    adapter.make = make
    return adapter


def writing(
    adapter: Any, store: WorkerStore, *, limits: BatchLimits | None = None, **settings: Any
) -> contextlib.AbstractContextManager[Running]:
    results = ResultWriter(store, "s3://pipefleet")
    return running(adapter, TASK, limits=limits, settings=WorkerSettings(**settings), results=results)


def calls(count: int) -> list[Call]:
    return [Call(f"text {index}") for index in range(count)]


def codes(outcomes: Sequence[Outcome]) -> list[str]:
    return [one.failure.code if one.failure else "" for one in outcomes]


def read(outcome: Outcome) -> Any:
    assert isinstance(outcome.output, Encoded), outcome
    return orjson.loads(outcome.output.body)


def test_results_wait_for_the_store_within_the_budget(pipe: Any, shard: Shard) -> None:
    living, store = Living(), Store()
    store.gate.clear()
    adapter = making(pipe, lambda _: living.array())
    with writing(adapter, store, in_flight_bytes=BUDGET, store_threads=2) as one:
        _, sink = one.submit(calls(40), bulk=True, shard=shard)
        wait_until(lambda: living.made >= 4 and store.inside == 2, "the store is reached, and results wait behind it")
        store.gate.set()
        outcomes = finished(sink)
        wait_until(lambda: one.engine._budget.empty, "all room has come back")
    assert codes(outcomes) == [""] * 40
    assert len(store.stored) == 40
    assert living.most <= BUDGET // BYTES + 1, "one more than the budget for each finish thread"
    assert living.now == 0, "a row may wait, its pixels may not"


def test_what_the_model_gave_waits_within_the_budget(pipe: Any, shard: Shard) -> None:
    living, gate, finishing = Living(), threading.Event(), threading.Event()

    class Large(Making):
        def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
            return [{"large": living.array()} for _ in units]

        def finish(self, assembly: Assembly) -> Any:
            finishing.set()
            assert gate.wait(SECONDS)
            return {"sum": float(assembly.outputs[0]["large"].sum())}

    limits = BatchLimits(max_cost=1 << 40, max_items=1, max_age=SECONDS)
    with writing(recording(Large, pipe), WorkerStore(), limits=limits, in_flight_bytes=BUDGET) as one:
        _, sink = one.submit(calls(20), bulk=True, shard=shard)
        assert finishing.wait(SECONDS)
        wait_until(lambda: living.made > BUDGET // BYTES, "the device waits for room, with one more in its hands")
        gate.set()
        outcomes = finished(sink)
    assert [read(outcome) for outcome in outcomes] == [{"sum": 0.0}] * 20
    assert living.most <= BUDGET // BYTES + 1
    assert living.now == 0


def test_results_larger_than_the_budget_pass_one_by_one(pipe: Any, shard: Shard) -> None:
    living, store = Living(), Store()
    adapter = making(pipe, lambda _: [living.array(), {"more": living.array()}])
    with writing(adapter, store, in_flight_bytes=BYTES) as one:
        outcomes = finished(one.submit(calls(6), bulk=True, shard=shard)[1])
    assert codes(outcomes) == [""] * 6
    assert living.most == 2, "those of one item"


def test_several_results_are_stored_at_once(pipe: Any, shard: Shard) -> None:
    living, store = Living(), Store()
    store.gate.clear()
    with writing(making(pipe, lambda _: living.array()), store, store_threads=6) as one:
        _, sink = one.submit(calls(20), shard=shard)
        wait_until(lambda: store.inside == 6, "six are on their way")
        store.gate.set()
        assert codes(finished(sink)) == [""] * 20


NUMBERS_OF_A_RESULT = np.random.default_rng(0).normal(size=(2, INLINE_NUMBERS)).astype(np.float32)
SOUND = Audio(np.linspace(-1, 1, 800, dtype=np.float32), 16_000)
STEREO = Audio(np.linspace(-1, 1, 800, dtype=np.float32).reshape(2, 400), 44_100)
PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
MASK = np.arange(35).reshape(5, 7) % 3 == 0


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (NUMBERS_OF_A_RESULT, ["output.npy"]),
        (NUMBERS_OF_A_RESULT.tolist()[0], []),
        (torch.tensor([0.5, -1.5]), ["output.npy"]),
        (torch.tensor([1, 2], dtype=torch.bfloat16), ["output.npy"]),
        (torch.tensor([[0, 0, 16_777_217, 9]]), ["output.npy"]),
        (SOUND, ["output.wav"]),
        ({"audio": STEREO, "sampling_rate": 44_100}, ["audio.wav"]),
        (PICTURE, ["output.png"]),
        (MASK, ["output.npy"]),
        ({"masks": [MASK, ~MASK], "scores": torch.tensor([1.0])}, ["masks.npy", "scores.npy"]),
        ([{"label": "cat", "mask": PICTURE, "a/b": [MASK]}, {"mask": PICTURE}], ["0-mask.png", "0-a_b.npy", "1-mask.png"]),
    ],
)  # fmt: skip
def test_artifacts_lie_where_they_always_lay_and_read_as_what_they_were(
    pipe: Any, shard: Shard, output: Any, names: list[str]
) -> None:
    store = Store()
    with writing(making(pipe, lambda _: output), store) as one:
        bulk = finished(one.submit(calls(2), shard=shard)[1])
        job = uuid.uuid4().hex
        single = finished(one.submit(calls(1), id=job)[1])
    prefixes = [f"{shard.run_uri}artifacts/000000{position}/" for position in (40, 41)]
    wanted = [f"{prefix}{name}" for prefix in (*prefixes, f"s3://pipefleet/results/{job}/") for name in names]
    assert sorted(store.stored) == sorted(wanted)
    for outcome in (*bulk, *single):
        same(resolve(read(outcome), lambda uri: store.get(StorageRef(uri))), output)


def same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, one in wanted.items():
            same(found[name], one)
    elif isinstance(wanted, list) and not isinstance(wanted[0], float):
        assert len(found) == len(wanted)
        for left, right in zip(found, wanted, strict=True):
            same(left, right)
    else:
        value = wanted.samples if isinstance(wanted, Audio) else wanted
        if isinstance(value, torch.Tensor):
            value = (value.float() if value.is_floating_point() else value).numpy()
            assert found.dtype == value.dtype
        assert np.array_equal(np.asarray(found), np.asarray(value))
        assert not isinstance(value, Image.Image) or found == value


class Odd:
    """No JSON."""


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


BAD = {
    "a mode that PNG does not have": Image.new("CMYK", (2, 2)),
    "another one": {"picture": Image.new("F", (2, 2))},
    "sound without a rate": Audio(np.zeros(4, np.float32), 0),
    "sound of three dimensions": Audio(np.zeros((2, 2, 2), np.float32), 16_000),
    "sound that is not finite": Audio(np.full(4, np.nan, np.float32), 16_000),
    "a long array with infinity": np.full(INLINE_NUMBERS + 1, np.inf),
    "a short one": np.full(2, np.nan),
    "a tensor that is not finite": torch.tensor([float("nan")]),
    "a sparse tensor": torch.zeros(2, 2).to_sparse(),
    "masks that do not stack": [MASK, "mask"],
    "no JSON": Odd(),
    "a number beyond 64 bits": 2**70,
    "a number beyond all floats": {"value": np.longdouble("1e4000")},
    "half a character": "lone \ud800",
    "too deep for JSON": nested(300),
    "too deep for Python": nested(3000),
    "an artifact beside what is no JSON": [np.zeros(INLINE_NUMBERS + 1), Odd()],
}


@pytest.mark.parametrize("name", BAD)
def test_a_result_that_cannot_be_written_fails_alone(pipe: Any, shard: Shard, name: str) -> None:
    store = Store()
    adapter = making(pipe, lambda text: BAD[name] if text == "text 1" else NUMBERS_OF_A_RESULT)
    with writing(adapter, store) as one:
        outcomes = finished(one.submit(calls(3), shard=shard)[1])
        wait_until(lambda: one.engine._budget.empty, "all room has come back")
    assert codes(outcomes) == ["", "bad_output", ""]
    assert outcomes[1].failure is not None
    assert outcomes[1].failure.stage == "write"
    assert len(store.stored) == 2


@pytest.mark.parametrize(
    "error", [MemoryError(), OverflowError("too large"), OSError("cannot write"), RecursionError()]
)
def test_whatever_a_codec_raises_is_its_items_failure(
    pipe: Any, shard: Shard, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any, buffer: Any, **options: Any) -> None:
        raise error

    picture = Image.new("RGB", (2, 2))
    monkeypatch.setattr(Image.Image, "save", broken)
    with writing(making(pipe, lambda text: picture if text == "text 1" else {"fine": 1}), Store()) as one:
        outcomes = finished(one.submit(calls(3), shard=shard)[1])
    assert codes(outcomes) == ["", "bad_output", ""]
    assert [read(outcomes[0]), read(outcomes[2])] == [{"fine": 1}] * 2


@pytest.mark.parametrize(("stop", "code"), [("cancelled", "cancelled"), ("deadline", "expired")])
def test_artifacts_of_a_job_that_was_stopped_are_not_stored(pipe: Any, shard: Shard, stop: str, code: str) -> None:
    store, living = Store(), Living()
    store.gate.clear()
    with writing(making(pipe, lambda _: living.array()), store, store_threads=1) as one:
        job, sink = one.submit(calls(6), bulk=True, shard=shard)
        wait_until(lambda: store.inside == 1, "the first is on its way")
        setattr(job, stop, True if stop == "cancelled" else time.monotonic() - 1.0)
        store.gate.set()
        outcomes = finished(sink)
        wait_until(lambda: one.engine._budget.empty, "all room has come back")
    assert sorted(codes(outcomes)) == ["", *[code] * 5]
    assert {one.failure.stage for one in outcomes if one.failure} <= {"write"}
    assert len(store.stored) == 1
    assert living.now == 0


@pytest.mark.parametrize("patient", [True, False])
def test_a_store_that_is_away_is_nobodys_failure_while_the_job_may_run_again(
    pipe: Any, shard: Shard, patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = WorkerStore(retries=0, retry_seconds=1.0)
    adapter = making(pipe, lambda text: NUMBERS_OF_A_RESULT if text == "text 1" else {"fine": 1})
    with writing(adapter, store) as one:
        _, sink = one.submit(calls(3), bulk=True, shard=shard, patient=patient)
        sink.wait(SECONDS)
        wait_until(lambda: one.engine._budget.empty, "all room has come back")
    if patient:
        assert isinstance(sink.abandoned, ServiceUnavailableError)
    else:
        outcomes = finished(sink)
        assert codes(outcomes) == ["", "unavailable", ""]
        assert [one.failure.stage for one in outcomes if one.failure] == ["write"]


def test_an_artifact_that_the_store_refuses_fails_its_item(pipe: Any, shard: Shard) -> None:
    class Refusing(Store):
        def put(self, uri: str, body: bytes, *, content_type: str) -> None:
            raise AccessDeniedError("S3 refuses access")

    with writing(making(pipe, lambda text: PICTURE if text == "text 1" else 1), Refusing()) as one:
        assert codes(finished(one.submit(calls(3), shard=shard)[1])) == ["", "forbidden", ""]


def test_a_panic_in_postprocessing_fails_its_item_alone(pipe: Any, shard: Shard) -> None:
    """Extensions in Rust panic with what is no Exception; the neighbours' artifacts may be on their way by then."""

    def make(text: str) -> Any:
        if text == "text 1":
            raise BaseException("panicked")
        return PICTURE

    with writing(making(pipe, make), Store()) as one:
        assert codes(finished(one.submit(calls(3), shard=shard)[1])) == ["", "model_error", ""]
