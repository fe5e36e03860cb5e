"""Calls of text tasks whose answer, or whose error, is that of transformers: numbers as labels, no words, None for a config."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError
from pipefleet.fleet.pools import Pool
from pipefleet.tasks import task_spec
from pipefleet.tasks.parameters import called_parameters, layered
from pipefleet_workers.adapters.table import RUNTIME
from tests.checkpoints.media import audio, image
from tests.parity.harness import Call, assert_same, load, recording, running

CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("text-generation", {"return_full_text": True, "return_text": True}, "return_full_text or return_text"),
    ("text-generation", {"return_full_text": False, "return_tensors": False}, "return_full_text or return_tensors"),
    ("text-generation", {"return_text": True, "return_tensors": True}, "return_tensors or return_text"),
    ("image-text-to-text", {"return_full_text": True, "return_tensors": True}, "return_full_text or return_tensors"),
    ("any-to-any", {"return_full_text": True, "return_tensors": True}, "return_full_text or return_tensors"),
    ("feature-extraction", {"truncation": True, "tokenize_kwargs": {"truncation": True}}, "not both"),
    ("text-generation", {"num_beams": 2, "num_return_sequences": 3}, "at most num_beams sequences"),
    ("summarization", {"num_beams": 2, "num_return_sequences": 3, "do_sample": True}, "at most num_beams sequences"),
    ("image-text-to-text", {"generate_kwargs": {"num_beams": 2}, "num_return_sequences": 3}, "at most num_beams"),
    ("text-generation", {"num_beams": 1, "do_sample": False, "num_return_sequences": 2}, "gives one sequence"),
    ("text-generation", {"temperature": 0.0, "do_sample": True}, "temperature above 0"),
    ("text-generation", {"stop": [""]}, "1 to 200 characters"),
    ("text-generation", {"stop_sequence": ""}, "1 to 200 characters"),
    ("summarization", {"stop_strings": ["a", ""]}, "1 to 200 characters"),
]
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("text-generation", {"return_type": 1, "return_full_text": True, "return_tensors": True}),
    ("text-generation", {"return_tensors": True, "return_full_text": None}),
    ("text-generation", {"num_return_sequences": 3, "do_sample": True}),
    ("text-generation", {"num_return_sequences": 3, "num_beams": 3}),
    ("text-generation", {"num_return_sequences": 3, "num_beams": None}),
    ("text-generation", {"temperature": 0.0}),
    ("feature-extraction", {"truncation": True, "tokenize_kwargs": {"max_length": 4}}),
]


def prepared(client: Client, task: str, parameters: dict[str, Any]) -> Any:
    spec = task_spec(task)
    return client.preparer(spec, Pool("one", task, "/m"), called_parameters(spec, parameters)).prepare("a")


@pytest.mark.parametrize(("task", "parameters", "words"), CONTRADICTIONS)
def test_parameters_that_contradict_each_other_are_refused_before_they_are_queued(
    client: Client, task: str, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(ParameterError, match=words):
        prepared(client, task, parameters)


@pytest.mark.parametrize(("task", "parameters"), TOGETHER)
def test_parameters_that_go_together_are_taken(client: Client, task: str, parameters: dict[str, Any]) -> None:
    prepared(client, task, parameters)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("text-generation", {"tools": [], "documents": []}),
        ("text-generation", {"return_dict_in_generate": False, "output_scores": False, "trust_remote_code": False}),
        ("text-generation", {"num_beam_groups": 1, "diversity_penalty": 0.0, "low_memory": False}),
        ("text-generation", {"generation_config": GenerationConfig(num_beam_groups=1, output_attentions=False)}),
        ("text-classification", {"return_all_scores": False}),
        ("token-classification", {"grouped_entities": False, "ignore_subwords": False}),
        ("image-text-to-text", {"processor_kwargs": {}, "generate_kwargs": {"output_attentions": False}}),
        ("document-question-answering", {"lang": "", "tesseract_config": ""}),
    ],
)
def test_a_refused_parameter_that_asks_for_nothing_is_a_call_without_it(task: str, given: dict[str, Any]) -> None:
    assert not any(called_parameters(task_spec(task), given).values())


def test_a_refused_parameter_that_asks_for_something_stays_refused() -> None:
    for name, value in {"tools": [{}], "output_scores": True, "num_beam_groups": 2, "diversity_penalty": 0.5}.items():
        with pytest.raises(ParameterError, match=name):
            called_parameters(task_spec("text-generation"), {name: value})


def test_none_for_a_config_takes_the_place_of_what_the_pipeline_asked_for() -> None:
    spec = task_spec("text-generation")
    below = {"max_new_tokens": 3, "do_sample": False, "prefix": "a"}
    found = called_parameters(spec, layered(spec, below, {"generation_config": None, "top_k": 2}))
    assert found == {"prefix": "a", "top_k": 2}


def test_a_text_of_no_words_has_no_entities(client: Client) -> None:
    task, words = "token-classification", {"is_split_into_words": True}
    pipe = load(task)
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        for strategy in ("none", "simple", "first"):
            given = {**words, "aggregation_strategy": strategy}
            outcomes = engine.run([Call(one, given) for one in (["Ada", "codes"], [])])
            assert [one.failure for one in outcomes] == [None, None]
            assert_same([one.output for one in outcomes], pipe([["Ada", "codes"], []], **given))
    spec = task_spec(task)
    assert client.preparer(spec, Pool("one", task, "/m"), words).prepare([]) == []
    with pytest.raises(InputError, match="lists of 1 to"):
        client.preparer(task_spec("table-question-answering")).prepare({"table": {"a": ["1"]}, "query": []})


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("zero-shot-classification", "one"),
        ("zero-shot-image-classification", image(40, 48)),
        ("zero-shot-audio-classification", audio(0.5)),
    ],
)
@pytest.mark.parametrize("labels", [[1, 2, 3], [1.5, "a", True]])
def test_labels_may_be_numbers(task: str, given: Any, labels: list[Any]) -> None:
    pipe, asked = load(task), called_parameters(task_spec(task), {"candidate_labels": labels})
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        (outcome,) = engine.run([Call(given, asked)])
    assert outcome.failure is None
    assert_same(outcome.output, pipe(given, candidate_labels=labels))


def test_zero_shot_classification_takes_a_truncation_that_changes_nothing() -> None:
    task, labels = "zero-shot-classification", {"candidate_labels": ["a", "b"]}
    pipe, text = load(task), "the sea of trees " * 200
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        outcomes = engine.run([Call(text, {**labels, **own}) for own in ({}, {"truncation": True})])
    for outcome in outcomes:
        assert_same(outcome.output, pipe(text, **labels, truncation=True))


FILLED = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "do_sample": False}
WRITTEN: list[tuple[str, dict[str, Any]]] = [
    ("summarization", {"decoder_start_token_id": 3, "max_new_tokens": 4, "num_beams": 1}),
    ("text2text-generation", {**FILLED, "pad_token_id": 7, "eos_token_id": list(range(40, 200))}),
    ("text2text-generation", {**FILLED, "eos_token_id": list(range(40, 200))}),
    ("text2text-generation", {**FILLED, "eos_token_id": list(range(200, 40, -1)), "return_tensors": True}),
    ("text-generation", {**FILLED, "pad_token_id": 7, "eos_token_id": list(range(40, 200))}),
    ("text-generation", {**FILLED, "eos_token_id": list(range(40, 200)), "return_tensors": True}),
]


@pytest.mark.parametrize(("task", "asked"), WRITTEN)
def test_tokens_that_begin_or_fill_a_text_show_as_in_transformers(task: str, asked: dict[str, Any]) -> None:
    pipe = load(task)
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        (outcome,) = engine.run([Call("a b c", asked)])
    assert outcome.failure is None, outcome.failure
    wanted = pipe("a b c", **asked)
    for record in wanted if "return_tensors" in asked else ():
        record["generated_token_ids"] = [int(token) for token in record["generated_token_ids"]]
    assert_same(outcome.output, wanted)


def test_vectors_of_a_text_that_is_padded_to_a_length() -> None:
    task, padded = "feature-extraction", {"padding": "max_length", "truncation": True, "max_length": 9}
    pipe, texts = load(task), ["the sea", "the sea of trees and " * 9, ""]
    asked = called_parameters(task_spec(task), {"tokenize_kwargs": padded})
    beyond = {"tokenize_kwargs": {"padding": "max_length", "max_length": 100_000}}
    with running(recording(RUNTIME[task].adapter, pipe), task) as engine:
        outcomes = engine.run([Call(one, asked) for one in texts])
        pooled = engine.run([Call("the sea", {**own, "pooling": "mean"}) for own in (asked, {})])
        (refused,) = engine.run([Call("a", beyond)])
    for text, outcome in zip(texts, outcomes, strict=True):
        assert_same(outcome.output, pipe(text, tokenize_kwargs=dict(padded)))
    assert_same(pooled[0].output, pooled[1].output)
    assert refused.failure is not None
    assert refused.failure.code == "too_long"
