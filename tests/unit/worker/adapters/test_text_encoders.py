"""Adapters of text encoders beyond what parity shows: refusals, the odd rules of pipelines, and what leaves the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipefleet_workers.adapters.pipelines.question_answering import _spans, encode
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.text.encoder import TextClassifier, default_function
from pipefleet_workers.adapters.text.fill_mask import MaskFiller
from pipefleet_workers.items import Assembly, Outcome
from tests.parity.harness import Call, Running, assert_same, load, recording, running

CLASSIFY, FILL, LABEL = "text-classification", "fill-mask", "token-classification"
ZERO_SHOT, ANSWER = "zero-shot-classification", "question-answering"


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {task: load(task) for task in (CLASSIFY, FILL, LABEL, ZERO_SHOT, ANSWER)}


@pytest.fixture
def engine(request: pytest.FixtureRequest, pipes: dict[str, Any]) -> Iterator[Running]:
    with running(recording(RUNTIME[request.param].adapter, pipes[request.param]), request.param) as one:
        yield one


def on(task: str) -> Any:
    return pytest.mark.parametrize("engine", [task], indirect=True, ids=[task])


def refused(outcome: Outcome) -> tuple[str, str]:
    assert outcome.failure is not None, f"expected a failure, not {outcome.output}"
    return outcome.failure.code, outcome.failure.message


@pytest.mark.parametrize("function", [None, "sigmoid", "softmax", "none"])
@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification", "single_label_classification"])
def test_a_classifier_applies_what_its_config_and_its_caller_ask_for(
    pipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, problem: str | None, function: str | None
) -> None:
    pipe = pipes[CLASSIFY]
    monkeypatch.setattr(pipe.model.config, "problem_type", problem)
    own = {} if function is None else {"function_to_apply": function}
    calls = [Call("Great!", own), Call("It was the worst.", {**own, "top_k": 2}), Call("ok", {**own, "top_k": None})]
    with running(recording(TextClassifier, pipe), CLASSIFY) as engine:
        outcomes = engine.run_together(calls)
    for call, outcome in zip(calls, outcomes, strict=True):
        wanted = pipe(call.inputs, **call.parameters)
        assert_same(outcome.output, wanted)
        assert [type(one["score"]) for one in outcome.output] == [float] * len(wanted)


def test_the_default_function_follows_problem_type_then_the_number_of_labels(pipes: dict[str, Any]) -> None:
    config = type(pipes[CLASSIFY].model.config)
    assert default_function(config(num_labels=1)) == "sigmoid"
    assert default_function(config(num_labels=2)) == "softmax"
    assert default_function(config(num_labels=1, problem_type="regression")) == "none"
    assert default_function(config(num_labels=3, problem_type="multi_label_classification")) == "sigmoid"


def test_equal_scores_keep_the_order_of_the_labels(pipes: dict[str, Any]) -> None:
    class Undecided(TextClassifier):
        def run(self, inputs: dict[str, Any], units: Any, progress: Progress) -> Any:
            return {"logits": torch.zeros(len(units), 3)}

    with running(recording(Undecided, pipes[CLASSIFY]), CLASSIFY) as engine:
        first, ranked = engine.run([Call("a"), Call("b", {"top_k": None})])
    assert [one["label"] for one in first.output] == ["NEGATIVE"]
    assert [one["label"] for one in ranked.output] == ["NEGATIVE", "NEUTRAL", "POSITIVE"]


@on(FILL)
def test_a_text_without_a_mask_fails_alone_and_says_what_the_mask_is(engine: Running) -> None:
    cut = {"tokenizer_kwargs": {"truncation": True, "max_length": 4}}
    good, none, off, many = engine.run(
        [Call("a [MASK]"), Call("nothing"), Call("it was a long [MASK]", cut), Call("a [MASK]", {"top_k": 100_000})]
    )
    assert good.failure is None
    assert refused(none) == refused(off)
    assert refused(none)[0] == "bad_input"
    assert "[MASK]" in refused(none)[1]
    assert refused(many)[0] == "bad_parameter"


def test_only_the_rows_of_masks_leave_the_device(pipes: dict[str, Any]) -> None:
    shapes = []

    class Noting(MaskFiller):
        def finish(self, assembly: Assembly) -> Any:
            shapes.append(np.shape(assembly.outputs[0]))
            return super().finish(assembly)

    with running(recording(Noting, pipes[FILL]), FILL) as engine:
        (outcome,) = engine.run([Call("the [MASK] and the [MASK]", {"top_k": 3})])
    assert [len(rows) for rows in outcome.output] == [3, 3]
    assert shapes == [(2, 2, 3)], "probabilities and tokens, two masks, three predictions"


@on(LABEL)
def test_what_an_entity_tagger_refuses_is_refused_with_a_reason(engine: Running) -> None:
    words, text, wide = engine.run(
        [
            Call(["Angela", "Merkel"]),
            Call("Angela Merkel", {"is_split_into_words": True}),
            Call("Angela Merkel", {"aggregation_strategy": "simple", "stride": 63}),
        ]
    )
    assert refused(words) == (
        "bad_input",
        "token-classification takes texts; pass is_split_into_words=true with lists of words",
    )
    assert refused(text) == ("bad_input", "token-classification takes lists of words")
    assert refused(wide)[0] == "bad_parameter"
    assert "room for 62 tokens" in refused(wide)[1]


@on(ZERO_SHOT)
def test_labels_are_needed_and_a_text_too(engine: Running) -> None:
    bare, blank, empty = engine.run(
        [Call("a"), Call("a", {"candidate_labels": " , "}), Call("", {"candidate_labels": ["x"]})]
    )
    assert refused(bare)[0] == refused(blank)[0] == "bad_parameter"
    assert refused(empty) == ("bad_input", "the text is empty")


@on(ANSWER)
def test_a_question_without_room_or_words_fails_alone(engine: Running) -> None:
    context = "The capital of France is Paris. " * 20
    good, long, empty, tight, narrow = engine.run(
        [
            Call({"question": "Where?", "context": context}),
            Call({"question": context, "context": context}),
            Call({"question": "Where?", "context": ""}),
            Call({"question": "Where?", "context": context}, {"max_seq_len": 10, "doc_stride": 500}),
            Call({"question": "Where?", "context": context}, {"max_seq_len": 5}),
        ]
    )
    assert good.failure is None
    assert "leaves no room for a context in 128 tokens" in refused(long)[1]
    assert refused(empty)[0] == "bad_input"
    assert tight.failure is None, "an overlap longer than the room is cut; the tokenizer would panic"
    assert "leaves no room" in refused(narrow)[1]


def test_a_question_is_cut_where_it_is_asked_for(pipes: dict[str, Any]) -> None:
    tokenizer = pipes[ANSWER].tokenizer
    example = {"question": "Where is the capital of France?", "context": "It is Paris."}
    ((whole,),) = encode(tokenizer, [example])
    ((cut,),) = encode(tokenizer, [example], max_question_len=3)
    found, uncut = cut.features["input_ids"].tolist(), whole.features["input_ids"].tolist()
    assert found[1:4] == uncut[1:4]
    assert found[4] == tokenizer.sep_token_id
    assert found[4:] == uncut[-len(found[4:]) :]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(2, 12), longest=st.integers(1, 15), count=st.integers(1, 6))
def test_the_best_spans_are_those_of_an_exhaustive_search(
    data: st.DataObject, size: int, longest: int, count: int
) -> None:
    scores = st.lists(st.integers(1, 10**6), min_size=size, max_size=size, unique=True)
    start, end = (np.asarray(data.draw(scores), np.float64) for _ in range(2))
    allowed = np.ones(size, bool)
    every = [
        float(start[first] * end[last]) for first in range(size) for last in range(first, min(size, first + longest))
    ]
    found = _spans(start, end, allowed, longest=longest, count=count)
    assert [score for _, _, score in found] == sorted(every, reverse=True)[:count]
    assert all(0 <= last - first < longest and start[first] * end[last] == score for first, last, score in found)


_ROWS = st.lists(
    st.lists(st.integers(1, 999), min_size=1, max_size=9).flatmap(
        lambda ids: st.fixed_dictionaries(
            {
                "input_ids": st.just(ids),
                "token_type_ids": st.sampled_from([0, 2, [0] * len(ids)]),
                "attention_mask": st.sampled_from([1, [1] * len(ids), np.ones(len(ids), np.int32)]),
            }
        )
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None)
@given(rows=_ROWS, side=st.sampled_from(["left", "right"]))
def test_a_number_is_collated_as_the_row_of_it(pipes: dict[str, Any], rows: list[dict[str, Any]], side: str) -> None:
    adapter = TextClassifier(copy.copy(pipes[CLASSIFY]))
    adapter.pipe.tokenizer = copy.copy(pipes[CLASSIFY].tokenizer)
    adapter.pipe.tokenizer.padding_side = side
    units: list[Any] = [SimpleNamespace(length=len(row["input_ids"]), features=row) for row in rows]
    pads = {"input_ids": adapter.pipe.tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
    longest = max(unit.length for unit in units)
    for name, found in adapter.collate(units).items():
        for unit, row in zip(units, found.tolist(), strict=True):
            given_ = unit.features[name]
            own = [given_] * unit.length if isinstance(given_, int) else list(given_)
            padding = [pads[name]] * (longest - unit.length)
            assert row == (padding + own if side == "left" else own + padding)
