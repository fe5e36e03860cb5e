"""Calls of text tasks as people know them from transformers: positional arguments, lists, names, tuples, bounds."""

from __future__ import annotations

from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipefleet.errors import InputError, ParameterError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.pipelines.calls import arguments_of
from pipefleet.pipelines.fleet_pipeline import FleetPipeline
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, implied_parameters, task_spec
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.items import ItemError
from pipefleet_workers.settings import WorkerSettings


class Echo(FleetPipeline):
    """Answers every input with what it was given and the answers of its task, without a fleet."""

    def __init__(self, task: str, answer: Any) -> None:
        super().__init__(None, task_spec(task), model=None, revision=None)  # type: ignore[arg-type]
        self.answer = answer
        self.given: list[tuple[Any, dict[str, Any]]] = []
        self.warnings: list[str] = []

    def _submit(
        self, inputs: Any, patience: Any, *, priority: str = "normal", expires: Any = None, **parameters: Any
    ) -> Any:
        self.given.append((inputs, parameters))
        return self

    def result(self, timeout: float | None = None) -> Any:
        return self.answer

    def _stream(self, inputs: Any, parameters: Any, *_: Any, **__: Any) -> Generator[Any]:
        return (self._submit(one, None, **parameters).result() for one in inputs)


@pytest.mark.parametrize(
    ("task", "inputs", "parameters", "wanted"),
    [
        ("zero-shot-classification", ("a", ["x", "y"]), {}, ("a", {"candidate_labels": ["x", "y"]})),
        ("zero-shot-classification", (), {"sequences": "a", "candidate_labels": "x"}, ("a", {"candidate_labels": "x"})),
        ("question-answering", ("q", "c"), {"top_k": 2}, ({"question": "q", "context": "c"}, {"top_k": 2})),
        ("question-answering", (), {"question": ["q", "p"], "context": "c"},
         ([{"question": "q", "context": "c"}, {"question": "p", "context": "c"}], {})),
        ("table-question-answering", ({"a": ["1"]}, ["q", "p"]), {},
         ({"table": {"a": ["1"]}, "query": ["q", "p"]}, {})),
        ("decision", ("late", {"q": {}}), {}, ({"state": "late", "questions": {"q": {}}}, {})),
    ],
)  # fmt: skip
def test_arguments_may_come_in_order_or_by_name(task: str, inputs: Any, parameters: Any, wanted: Any) -> None:
    assert arguments_of(task_spec(task), inputs, parameters) == wanted


def test_lists_of_texts_are_answered_without_a_list_around_each_single_answer() -> None:
    pipe = Echo("translation_en_to_fr", [{"translation_text": "oui"}])
    assert pipe("yes") == [{"translation_text": "oui"}]
    assert pipe(["yes", "yes"]) == [{"translation_text": "oui"}] * 2
    assert pipe(["yes"], top_k=3) == [{"translation_text": "oui"}], "here top_k is a matter of sampling"
    pipe.answer = [{"translation_text": "oui"}, {"translation_text": "si"}]
    assert pipe(["yes"], num_return_sequences=2) == [pipe.answer]
    labels = Echo("text-classification", [{"label": "A"}])
    assert labels(["a"]) == [{"label": "A"}]
    assert labels(["a"], top_k=1) == [[{"label": "A"}]]


@pytest.mark.parametrize("task", ["fill-mask", "question-answering", "table-question-answering"])
def test_a_list_of_one_is_answered_as_that_one_alone_where_transformers_does_so(task: str) -> None:
    pipe = Echo(task, {"answer": "x"})
    assert pipe([{"question": "q", "context": "c"}]) == {"answer": "x"}
    assert pipe([{"question": "q", "context": "c"}] * 2) == [{"answer": "x"}] * 2


def test_cells_have_tuples_as_coordinates() -> None:
    pipe = Echo("table-question-answering", {"answer": "1", "coordinates": [[0, 1], [2, 3]], "cells": ["1", "2"]})
    assert pipe({"table": {}, "query": "q"})["coordinates"] == [(0, 1), (2, 3)]
    pipe.answer = {"answer": "", "coordinates": [], "cells": []}
    assert pipe({"table": {}, "query": "q"})["coordinates"] == []


def test_a_list_of_words_is_one_text_and_a_list_of_such_lists_is_several() -> None:
    pipe = Echo("ner", [])
    pipe(["Ada", "codes"], is_split_into_words=True)
    pipe([["Ada"], ["codes", "."]], is_split_into_words=True)
    pipe(["Ada", "codes"])
    assert [inputs for inputs, _ in pipe.given] == [["Ada", "codes"], ["Ada"], ["codes", "."], "Ada", "codes"]


class Asked:
    """A client that keeps what it was asked and answers nothing."""

    settings = SimpleNamespace(in_flight=4)
    warnings = ()

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def submit_patiently(self, _: Any, task: str, inputs: Any, *, parameters: Any, **how: Any) -> Asked:
        self.asked.append((inputs, parameters))
        return self

    def result(self, timeout: float | None = None) -> Any:
        return self.answer


def test_words_are_one_text_if_the_call_says_so_and_not_if_only_its_pipeline_does() -> None:
    split, client = {"is_split_into_words": True}, Asked([])
    pipe = FleetPipeline(client, task_spec("ner"), model=None, revision=None, defaults=split)  # type: ignore[arg-type]
    assert pipe(["a", "b"]) == [[], []]
    pipe("a")
    assert client.asked == [("a", {}), ("b", {}), ("a", {})]
    client.asked.clear()
    pipe(["a", "b"], is_split_into_words=True)
    pipe([["a", "b"]])
    pipe.submit(["a", "b"])
    assert client.asked == [(["a", "b"], split)] * 3


WRITTEN = [
    ("image-text-to-text", "generated_token_ids", {"return_tensors": False}),
    ("image-text-to-text", "generated_token_ids", {"return_type": 0}),
    ("any-to-any", "generated_token_ids", {"return_tensors": True}),
    ("text2text-generation", "generated_token_ids", {"return_tensors": True}),
    ("text2text-generation", "generated_token_ids", {"return_text": False}),
    ("summarization", "summary_token_ids", {"return_tensors": True}),
    ("translation_en_to_fr", "translation_token_ids", {"return_tensors": True}),
]


@pytest.mark.parametrize(("task", "key", "parameters"), WRITTEN)
def test_tokens_are_a_tensor_however_they_are_asked_for(task: str, key: str, parameters: dict[str, Any]) -> None:
    client = Asked([{key: [3, 4]}])
    pipe = FleetPipeline(client, task_spec(task), model=None, revision=None)  # type: ignore[arg-type]
    assert torch.equal(pipe("a", **parameters)[0][key], torch.tensor([3, 4]))


def test_words_travel_as_they_are_and_never_become_references() -> None:
    preparer = InputPreparer(TASKS["token-classification"], ObjectStore.__new__(ObjectStore), "x/", inline_bytes=100)
    words = ["see", "s3://bucket/text.txt"]
    assert preparer.prepare(words) == words
    for wrong in (["a", 3], [["a"]]):
        with pytest.raises(InputError, match="token-classification takes"):
            preparer.prepare(wrong)
    decoder = Decoder(TASKS["token-classification"], WorkerSettings(), sampling_rate=None)
    assert decoder._value(words) == words
    for wrong in ([3], 3):
        with pytest.raises(ItemError):
            decoder._value(wrong)


def test_a_translation_task_is_named_with_its_languages() -> None:
    assert task_spec("translation_en_to_fr") is TASKS["translation_xx_to_yy"]
    assert implied_parameters("translation_en_to_fr") == {"src_lang": "en", "tgt_lang": "fr"}
    assert implied_parameters("translation_xx_to_yy") == implied_parameters("translation") == {}
    task_spec("translation_en_to_fr").check(implied_parameters("translation_en_to_fr"))


REFUSED = [
    ("zero-shot-classification", {"hypothesis_template": "{:>3000000}"}),
    ("zero-shot-classification", {"hypothesis_template": "{0.__class__}"}),
    ("zero-shot-classification", {"hypothesis_template": "no place for a label"}),
    ("zero-shot-classification", {"hypothesis_template": "{} and {}"}),
    ("fill-mask", {"tokenizer_kwargs": {"chat_template": "{{ 1 }}"}}),
    ("fill-mask", {"top_k": 0}),
    ("question-answering", {"top_k": 0}),
    ("question-answering", {"max_answer_len": 0}),
    ("table-question-answering", {"truncation": "only_first"}),
    ("token-classification", {"aggregation_strategy": "median"}),
    ("summarization", {"return_tensors": "pt"}),
    ("translation", {"src_lang": 3}),
    ("translation", {"custom_generate": "org/code"}),
    ("decision", {"assets": {"x": "/etc/passwd"}}),
]


@pytest.mark.parametrize(("task", "parameters"), REFUSED)
def test_what_no_task_allows_is_refused(task: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(ParameterError):
        task_spec(task).check(parameters)


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("zero-shot-classification", {"hypothesis_template": "It is {}.", "candidate_labels": "a,b"}),
        ("fill-mask", {"targets": "cat", "top_k": 3, "tokenizer_kwargs": {"truncation": True, "padding": True}}),
        ("text-classification", {"truncation": True, "padding": True, "max_length": 512}),
        ("summarization", {"min_length": 5, "max_length": 20, "num_beams": 4, "early_stopping": True}),
        ("ner", {"aggregation_strategy": "simple", "ignore_labels": ["O"], "stride": 16}),
    ],
)
def test_what_people_pass_is_allowed(task: str, parameters: dict[str, Any]) -> None:
    task_spec(task).check(parameters)


def test_a_pipeline_predicts_and_transforms_as_it_is_called() -> None:
    pipe = Echo("text-classification", [{"label": "a", "score": 1.0}])
    assert pipe.predict("x") == pipe.transform("x") == pipe("x")
    assert pipe.predict(["x", "y"]) == pipe(["x", "y"])


def test_a_part_that_only_a_process_with_the_model_has_is_named() -> None:
    pipe = Echo("text-generation", [])
    assert not hasattr(pipe, "model")
    with pytest.raises(AttributeError, match="has no 'tokenizer'; the model is with the workers"):
        _ = pipe.tokenizer


def test_features_are_tensors_where_they_are_asked_for() -> None:
    pipe = Echo("feature-extraction", [[[0.5, 1.0]]])
    assert pipe("x", return_tensors=True).shape == (1, 1, 2)
    assert pipe("x") == [[[0.5, 1.0]]]
