"""The write stage: a line for every item in order, whatever its input and its result are; never NaN, and never a lost shard."""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import JobItem, Shard
from pipefleet.contract.parts import FLOAT32, part_format
from pipefleet.contract.records import JobFailure
from pipefleet.errors import ServiceUnavailableError
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.items import Encoded, ItemError, JobContext, Outcome, Work, spend
from pipefleet_workers.results.lines import PartWriter, ResultWriter, body_of, dumps
from pipefleet_workers.storage.store import WorkerStore


@dataclass
class Plain:
    score: float


class Refusing(Mapping[str, Any]):
    """Can be neither read nor written."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error or MemoryError("too long a row")

    def __getitem__(self, key: str) -> Any:
        raise self._error

    def __iter__(self) -> Iterator[str]:
        raise self._error

    def __len__(self) -> int:
        return 1


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "body"),
    [
        ({"label": "null", "score": 0.5, "box": None}, b'{"label":"null","score":0.5,"box":null}'),
        ((1, [2.0, True]), b"[1,[2.0,true]]"),
        ({1: "a", None: "b"}, b'{"1":"a","null":"b"}'),
        (np.arange(3, dtype=np.float32), b"[0.0,1.0,2.0]"),
        (np.arange(6, dtype=np.int64).reshape(2, 3).T, b"[[0,3],[1,4],[2,5]]"),
        ([np.float16(0.5), np.int8(-1), np.bool_(True)], b"[0.5,-1,true]"),
        (MappingProxyType({"a": OrderedDict(b=1)}), b'{"a":{"b":1}}'),
    ],
)
def test_results_become_json(value: Any, body: bytes) -> None:
    assert dumps(value) == body


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "place",
    [
        lambda number: number,
        lambda number: [{"score": number}],
        lambda number: (1.0, None, (2.0, number)),
        lambda number: {"a": {number: 1}},
        lambda number: {"score": np.float32(number)},
        lambda number: {"score": np.float16(number)},
        lambda number: {"vector": np.array([1.0, number])},
        lambda number: np.array([[1.0, 2.0], [3.0, number]])[:, ::-1],
        lambda number: np.array([None, number], dtype=object),
        lambda number: MappingProxyType({"a": [number]}),
    ],
)
def test_nan_and_infinity_are_refused_wherever_they_stand(place: Any, number: float) -> None:
    with pytest.raises(ItemError, match="NaN or infinity") as caught:
        dumps(place(number))
    assert caught.value.failure.code == "bad_output"


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"bytes",
        1j,
        np.array([1j]),
        np.zeros(2, ">f4"),
        2**64,
        "lone \ud800",
        Plain(float("nan")),
        nested(300),
    ],
)
def test_what_json_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(ItemError) as caught:
        dumps({"value": value})
    assert caught.value.failure.code == "bad_output"


@pytest.fixture
def shard(environment: dict[str, str]) -> Shard:
    run = f"s3://pipefleet/write/{uuid.uuid4().hex}/"
    return Shard("run", run, RunLayout(run).shard(0), 0, 0, 2)


def outcome(
    position: int, inputs: Any, *, output: Any = None, failure: JobFailure | None = None, **item: Any
) -> Outcome:
    context = JobContext("job", None, {}, 9, None, Outcomes(range(2)))
    work = Work(context, position, JobItem(**{"id": str(position), "inputs": inputs} | item), {}, 1, {"fetch": 0.25})
    return Outcome(work, output=output, failure=failure)


def written(shard: Shard, outcomes: list[Outcome]) -> list[dict[str, Any]]:
    assert PartWriter(WorkerStore(), {"worker": "w"}).write(shard, outcomes)
    return [orjson.loads(line) for line in ObjectStore().get(RunLayout(shard.run_uri).part(0)).splitlines()]


def test_a_part_has_a_line_for_each_item_in_order(shard: Shard) -> None:
    reference = {"$ref": "s3://media/cat.jpg", "size": 3}
    failure = JobFailure("bad_media", "no picture", "decode")
    first = outcome(0, {"image": reference}, output=[{"label": "cat"}], parameters={"top_k": 1})
    rows = written(shard, [first, outcome(1, "text", failure=failure)])
    provenance = {"worker": "w", "seconds": {"fetch": 0.25}}
    assert rows == [
        {
            "id": "0",
            "input": {"image": "s3://media/cat.jpg"},
            "parameters": {"top_k": 1},
            "output": [{"label": "cat"}],
            "provenance": provenance,
        },
        {"id": "1", "input": "text", "error": failure.to_json(), "provenance": provenance},
    ]


def test_the_first_part_stays(shard: Shard) -> None:
    rows = written(shard, [outcome(0, "a", output=1), outcome(1, "b", output=2)])
    assert not PartWriter(WorkerStore(), {}).write(shard, [outcome(0, "a", output=3), outcome(1, "b", output=4)])
    assert [row["output"] for row in rows] == [1, 2]


@pytest.mark.parametrize(
    "item",
    [
        {"inputs": 2**70},
        {"inputs": {"text": "lone \ud800 surrogate"}},
        {"inputs": [1.0, 10**30]},
        {"inputs": nested(300)},
        {"inputs": nested(2000)},
        {"inputs": {"$ref": "s3://bucket/key", "size": "large"}},
        {"inputs": "fine", "parameters": {"top_k": 2**70}},
        {"inputs": "fine", "id": "lone \ud800"},
    ],
)
def test_an_item_that_cannot_be_written_fails_alone(shard: Shard, item: dict[str, Any]) -> None:
    rows = written(shard, [outcome(0, output={"a": 1}, **item), outcome(1, "fine", output={"a": 1})])
    assert (rows[0]["error"]["code"], rows[0]["error"]["stage"]) == ("bad_input", "write")
    assert rows[0]["input"] is None
    assert "output" not in rows[0]
    assert (rows[1]["input"], rows[1]["output"]) == ("fine", {"a": 1})


def test_an_item_that_cannot_be_written_keeps_the_failure_it_had(shard: Shard) -> None:
    failure = JobFailure("model_error", "lone \ud800", "forward")
    rows = written(shard, [outcome(0, 2**70, failure=failure), outcome(1, "fine", output=1)])
    assert rows[0]["error"] == JobFailure("model_error", "lone ?", "forward").to_json()


@pytest.mark.parametrize(
    "output", [float("nan"), object(), nested(2000), Refusing(), np.full(9, np.nan), {"score": np.float32("inf")}]
)
def test_a_result_that_cannot_be_written_fails_alone(shard: Shard, output: Any) -> None:
    rows = written(shard, [outcome(0, "text", output=output), outcome(1, "fine", output=1)])
    assert rows[0]["error"]["code"] == "bad_output"
    assert rows[0]["input"] == "text"
    assert rows[1]["output"] == 1


@pytest.mark.parametrize("output", [1, np.zeros(9)])
def test_a_server_that_is_away_fails_no_item(shard: Shard, output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    store = WorkerStore(retries=1, retry_seconds=2.0)
    with pytest.raises(ServiceUnavailableError):
        PartWriter(store, {}).write(shard, [outcome(0, "a", output=output), outcome(1, "b", output=output)])


@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        ({"inputs": "text", "output": Encoded(b'"lone \\ud800"')}, "text"),
        ({"inputs": "text", "output": Encoded(b"[" * 3000 + b"]" * 3000)}, "text"),
        ({"inputs": "text", "output": Encoded(b"9" * 5000), "parameters": {"top_k": 1}}, "text"),
        ({"inputs": "text", "output": 1, "id": 7}, None),
        ({"inputs": "text", "failure": JobFailure("x", "y", 3)}, "text"),  # type: ignore[arg-type]
    ],
)
def test_a_row_that_parquet_cannot_hold_fails_alone(shard: Shard, bad: dict[str, Any], kept: str | None) -> None:
    parquet = part_format("parquet")
    ends = [outcome(0, "a", output=[1.0, 2.0]), outcome(1, **bad), outcome(2, "c", output=[3.0, 4.0])]
    part = PartWriter(WorkerStore(), {"worker": "w"}).write(replace(shard, format="parquet"), ends)
    assert part is not None
    first, second, third = parquet.rows(part)
    assert [first["output"], third["output"]] == [[1.0, 2.0], [3.0, 4.0]]
    assert (second["error"]["code"], second["error"]["stage"]) == ("bad_output", "write")
    assert (second["id"], second["input"]) == (str(bad.get("id", 1)), kept)
    assert "output" not in second


@pytest.mark.parametrize(
    "outputs",
    [
        [[1e300, 0.5], [1.0, 2.0]],
        [[1.0, 2.0], [1.0]],
        [[1.0, 2.0], {"a": [2**64 - 1]}],
        [[1.0, 2], [1.0, 2.0]],
        [nested(250), None],
        [[1.0, None], []],
    ],
)
def test_parquet_holds_whatever_is_json(outputs: list[Any]) -> None:
    parquet = part_format("parquet")
    rows = [{"id": "0", "input": "text", "output": output, "provenance": {}} for output in outputs]
    part = parquet.encode([orjson.dumps(row) for row in rows])
    assert [row["output"] for row in parquet.rows(part)] == outputs


_NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
_RESULTS = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.one_of(
            st.lists(_NUMBERS, min_size=width, max_size=width),
            st.lists(_NUMBERS, min_size=width, max_size=width),
            st.lists(_NUMBERS, min_size=1, max_size=3),
            st.just(JobFailure("bad_input", "no text", "decode")),
        ),
        min_size=1,
        max_size=6,
    )
)


def vectors(shard: Shard, results: Sequence[Any]) -> list[Outcome]:
    """The outcomes of vectors as the engine gives them; an item may have a failure instead."""
    writer, outcomes = ResultWriter(WorkerStore(), "s3://bucket/store"), []
    for place, result in enumerate(results):
        work = outcome(place, "text").work
        work.job.shard = shard
        failed = isinstance(result, JobFailure)
        output = None if failed else writer.write(writer.take_apart(work, np.array(result, dtype=np.float32)))
        outcomes.append(Outcome(work, output, result if failed else None))
    return outcomes


@settings(deadline=None)
@given(_RESULTS)
def test_vectors_make_the_part_that_their_json_makes(results: list[Any]) -> None:
    parquet, writer = part_format("parquet"), PartWriter(WorkerStore(), {"worker": "w"})
    shard = Shard("run", "s3://bucket/run/", "s3://bucket/run/0.jsonl", 0, 0, len(results), "parquet")
    outcomes = vectors(shard, results)
    bodies = [
        replace(one, output=Encoded(body)) if isinstance(body := body_of(one), bytes) else one for one in outcomes
    ]
    expected = writer._encoded(parquet, bodies)
    assert (writer._of_vectors(parquet, outcomes) or writer._encoded(parquet, outcomes)) == expected
    plain = all(isinstance(one, list) and max(map(abs, one)) <= FLOAT32 for one in results)
    alike = plain and len({len(one) for one in results}) == 1
    assert (writer._of_vectors(parquet, outcomes) is not None) == alike
    assert parquet.failed(expected) == [row for row in parquet.rows(expected) if "error" in row]


def test_an_item_that_is_no_json_keeps_its_failure_beside_vectors(shard: Shard) -> None:
    ends = vectors(replace(shard, format="parquet"), [[1.0, 2.0], [3.0, 4.0]])
    bad = replace(ends[0].work.item, inputs=object())
    ends[0] = replace(ends[0], work=replace(ends[0].work, item=bad))
    part = PartWriter(WorkerStore(), {"worker": "w"}).write(replace(shard, format="parquet"), ends)
    assert part is not None
    first, second = part_format("parquet").rows(part)
    assert (first["error"]["code"], "output" in first, second["output"]) == ("bad_input", False, [3.0, 4.0])


@pytest.mark.parametrize("value", [[float("nan"), 1.0], [float("inf")]])
def test_a_vector_that_is_not_finite_is_no_result(shard: Shard, value: list[float]) -> None:
    with pytest.raises(ItemError, match="NaN or infinity"):
        vectors(replace(shard, format="parquet"), [value])


def test_items_share_the_seconds_of_a_stage_and_keep_those_of_their_own(shard: Shard) -> None:
    outcomes = [outcome(place, "text", output=1) for place in range(4)]
    works = [replace(one.work, seconds={}) for one in outcomes]
    outcomes = [replace(one, work=work) for one, work in zip(outcomes, works, strict=True)]
    for work in works[1:]:
        work.seconds = works[0].seconds
    spend(works, "decode", 0.25)
    assert len({id(work.seconds) for work in works}) == 1
    before = works[0].seconds
    spend([works[0], works[1], works[1]], "forward", 0.5)
    assert (works[2].seconds, before) == ({"decode": 0.25}, {"decode": 0.25})
    part = PartWriter(WorkerStore(), {"worker": "w"}).write(shard, outcomes)
    assert part is not None
    told = [row["provenance"] for row in part_format("jsonl").rows(part)]
    assert told[0] == {"worker": "w", "seconds": {"decode": 0.25, "forward": 0.5}}
    assert [one["seconds"].get("forward") for one in told] == [0.5, 1.0, None, None]
