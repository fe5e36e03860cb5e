"""What a tokenizer takes at once is bounded, for each task that cannot judge its texts by their beginning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from pipefleet.contract.messages import JobItem
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text import long_texts
from pipefleet_workers.consume.jobs import work_of
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.engine import _bytes_of
from pipefleet_workers.inputs.declared import CHARACTER
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.items import Blob, Decoded, Fetched, ItemError, JobContext, Work
from pipefleet_workers.settings import WorkerSettings
from tests.parity.harness import load

MOST = 3000
SETTING = "PIPEFLEET_WORKER_MAX_WHOLE_CHARACTERS"
PICTURE = Image.new("RGB", (32, 32))
BOX = [0, 0, 1, 1]
SENTENCE = "the old sea was wide "


def work(parameters: dict[str, Any] | None = None) -> Work:
    context = JobContext("job", None, parameters or {}, 3, None, Outcomes(range(1)))
    return Work(context, 0, JobItem("0", None), context.parameters, 0)


def prepared(adapter: Adapter, value: Any, parameters: dict[str, Any]) -> Any:
    return adapter.prepare([Decoded(work(parameters), value)])[0]


def table(rows: int) -> pandas.DataFrame:
    return pandas.DataFrame({"name": ["sea"] * rows, "count": ["1"] * rows}, dtype=str)


PIECES = {"aggregation_strategy": "simple", "stride": 61}
REFUSED: list[tuple[str, Any, dict[str, Any]]] = [
    ("question-answering", {"question": "how wide", "context": SENTENCE * 200}, {}),
    ("question-answering", {"question": "how wide", "context": SENTENCE * 40}, {"doc_stride": 380}),
    ("token-classification", SENTENCE * 40, PIECES),
    ("token-classification", SENTENCE * 200, {"aggregation_strategy": "simple", "stride": 8}),
    ("token-classification", SENTENCE.split() * 40, {"is_split_into_words": True, **PIECES}),
    ("table-question-answering", {"table": table(600), "query": "how"}, {"truncation": True}),
    ("table-question-answering", {"table": table(40), "query": ["how"] * 20}, {"truncation": True}),
    ("document-question-answering", {"image": PICTURE, "question": "how", "word_boxes": [["sea", BOX]] * 900}, {}),
    ("text-generation", " " * 4000, {}),
    ("feature-extraction", "\ufdfa" * 300, {}),
    ("zero-shot-classification", "the sea", {"candidate_labels": ["sea"] * 900}),
    ("zero-shot-image-classification", PICTURE, {"candidate_labels": ["sea"] * 900}),
    ("zero-shot-object-detection", PICTURE, {"candidate_labels": ["sea"] * 900}),
    ("zero-shot-audio-classification", np.zeros(800, np.float32), {"candidate_labels": ["sea"] * 900}),
]


@pytest.mark.parametrize(("name", "value", "parameters"), REFUSED, ids=[one[0] for one in REFUSED])
def test_what_would_be_tokenised_at_once_is_bounded(
    name: str, value: Any, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load(name)
    free = prepared(RUNTIME[name].adapter(pipe), value, parameters)
    assert not isinstance(free, ItemError) or SETTING not in free.failure.message
    monkeypatch.setenv(SETTING, str(MOST))
    found = prepared(RUNTIME[name].adapter(pipe), value, parameters)
    assert isinstance(found, ItemError)
    assert found.failure.code == "too_long"
    assert SETTING in found.failure.message


def test_words_behind_those_that_are_read_are_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = RUNTIME["token-classification"].adapter(load("token-classification"))
    words, parameters = SENTENCE.split() * 3000, {"is_split_into_words": True}
    (unit,) = prepared(adapter, words, parameters)
    assert len(unit.assembly.context.sentence.text) < len(SENTENCE) * 300
    monkeypatch.setattr(long_texts, "LONG_BOTH", 1 << 30)
    (whole,) = prepared(adapter, words, parameters)
    assert {name: one.tolist() for name, one in unit.features.items()} == {
        name: one.tolist() for name, one in whole.features.items()
    }


@pytest.mark.parametrize(
    ("name", "value", "parameters"),
    [
        ("question-answering", {"question": "how wide", "context": SENTENCE * 900}, {}),
        ("token-classification", SENTENCE * 900, {"aggregation_strategy": "simple", "stride": 8}),
    ],
)
def test_what_is_kept_of_pieces_for_the_end_is_counted(name: str, value: Any, parameters: dict[str, Any]) -> None:
    units = prepared(RUNTIME[name].adapter(load(name)), value, parameters)
    features = sum(one.nbytes for unit in units for one in unit.features.values())
    assert _bytes_of(units) > 1.5 * features


def test_texts_that_come_as_objects_are_bounded_together() -> None:
    decoder = Decoder(task_spec("text-generation"), WorkerSettings(max_text_bytes=100), sampling_rate=None)
    part = Blob("s3://test/part", b"x" * 40, None)
    chat = [{"role": "user", "content": part}] * 3
    decoder.decode(Fetched(work(), chat[:2]))
    with pytest.raises(ItemError) as caught:
        decoder.decode(Fetched(work(), chat))
    assert caught.value.failure.code == "too_large"


def test_parameters_weigh_with_their_item() -> None:
    decoder = Decoder(task_spec("zero-shot-classification"), WorkerSettings(), sampling_rate=None)
    shared = work({"candidate_labels": ["sea" * 100]})
    first, second = decoder.weights([Fetched(shared, "sea"), Fetched(shared, "sea")])
    assert first - second > 300 * CHARACTER
    own = JobItem("0", "sea", {"candidate_labels": ["sea" * 100]})
    assert work_of(shared.job, 0, own).weight > 300
