"""Parameters that people give to pipelines: every one of transformers' is taken or refused with a reason; values of any library."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.text_classification import ClassificationFunction
from transformers.pipelines.text_generation import ReturnType
from transformers.pipelines.token_classification import AggregationStrategy

from pipefleet.client import _checked
from pipefleet.errors import ParameterError
from pipefleet.pipelines.tensors import with_tensors
from pipefleet.tasks import TASKS, task_spec
from pipefleet.tasks.generation import GENERATION
from pipefleet.tasks.parameters import called_parameters, layered
from pipefleet.tasks.refused import OF_A_TASK, REASONS, why_refused
from pipefleet.tasks.requirements import Known

PAGE = Path(__file__).parents[4] / "docs" / "same-as-transformers.md"
_KEYWORD = re.compile(r'"(\w+)" in kwargs|(?<!_)kwargs\["(\w+)"\]|(?<!_)kwargs\.get\("(\w+)"')


def names_of(task: str) -> set[str]:
    """What the `_sanitize_parameters` of a task's pipeline looks for."""
    found = PIPELINE_REGISTRY.check_task(task)[1]["impl"]
    pipeline = getattr(transformers, found.rpartition(".")[2]) if isinstance(found, str) else found
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = inspect.signature(pipeline._sanitize_parameters).parameters.values()
    names = {one.name for one in named if one.kind in plain and one.name != "self"}
    for groups in _KEYWORD.findall(inspect.getsource(pipeline._sanitize_parameters)):
        names |= {one for one in groups if one}
    return names


TASKS_OF_TRANSFORMERS = sorted(set(TASKS) & set(PIPELINE_REGISTRY.get_supported_tasks()))


@pytest.mark.parametrize("task", TASKS_OF_TRANSFORMERS)
def test_every_parameter_of_a_pipeline_is_taken_or_refused_with_a_reason(task: str) -> None:
    spec = TASKS[task]
    silent = [name for name in names_of(task) if name not in spec.parameters and not why_refused(task, name)]
    assert silent == []
    assert len(TASKS_OF_TRANSFORMERS) > 20


WRITERS = sorted(name for name, spec in TASKS.items() if "max_new_tokens" in spec.parameters)


@pytest.mark.parametrize("task", WRITERS)
def test_every_argument_of_generate_is_taken_or_refused_with_a_reason(task: str) -> None:
    arguments = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    silent = [name for name in arguments if name not in TASKS[task].parameters and not why_refused(task, name)]
    assert silent == []
    assert set(GENERATION) <= arguments


def test_the_page_names_every_refused_parameter() -> None:
    page = PAGE.read_text().partition("## Parameters")[2].partition("\n## ")[0]
    missing = sorted({name for name in (*REASONS, *(name for _, name in OF_A_TASK)) if f"`{name}`" not in page})
    assert missing == []


def test_a_refusal_says_why() -> None:
    with pytest.raises(ParameterError, match=r"takes no parameter 'streamer': tokens come with the result"):
        task_spec("text-generation").check({"streamer": 1})


VALUES = [
    ("text-generation", {"max_new_tokens": np.int64(5)}, {"max_new_tokens": 5}),
    ("text-generation", {"temperature": torch.tensor(0.5)}, {"temperature": 0.5}),
    ("text-generation", {"do_sample": np.bool_(True)}, {"do_sample": True}),
    ("text-generation", {"eos_token_id": torch.tensor([1, 2])}, {"eos_token_id": [1, 2]}),
    ("text-generation", {"sequence_bias": {(1, 2): -3.0}}, {"sequence_bias": [[[1, 2], -3.0]]}),
    ("text-generation", {"return_type": ReturnType.NEW_TEXT}, {"return_type": 1}),
    ("text-generation", {"max_new_tokens": None}, {"max_new_tokens": None}),
    ("text-classification", {"function_to_apply": ClassificationFunction.SIGMOID}, {"function_to_apply": "sigmoid"}),
    ("text-classification", {"function_to_apply": "SoftMax"}, {"function_to_apply": "SoftMax"}),
    ("token-classification", {"aggregation_strategy": AggregationStrategy.MAX}, {"aggregation_strategy": "max"}),
    pytest.param("token-classification", {"ignore_labels": {"O", "B-PER"}}, {"ignore_labels": ["B-PER", "O"]}, id="a set"),
    ("automatic-speech-recognition", {"stride_length_s": (4, 2)}, {"stride_length_s": [4, 2]}),
    ("automatic-speech-recognition", {"prompt_ids": np.array([5, 6])}, {"prompt_ids": [5, 6]}),
    ("automatic-speech-recognition", {"temperature": (0.0, 0.4)}, {"temperature": [0.0, 0.4]}),
    ("image-feature-extraction", {"out_features": ("stage1",)}, {"out_features": ["stage1"]}),
    ("zero-shot-classification", {"candidate_labels": np.array(["a", "b"])}, {"candidate_labels": ["a", "b"]}),
    ("text-generation", {"generation_config": GenerationConfig(num_beams=2), "num_beams": 3}, {"num_beams": 3}),
    ("text-generation", {"top_k": 5.0, "do_sample": 1}, {"top_k": 5, "do_sample": True}),
    ("any-to-any", {"generate_kwargs": {"max_new_tokens": 4.0}}, {"generate_kwargs": {"max_new_tokens": 4}}),
    ("zero-shot-classification", {"multi_label": 0}, {"multi_label": False}),
    ("image-feature-extraction", {"pool": np.int64(1)}, {"pool": True}),
    ("token-classification", {"ignore_labels": [0, "O"]}, {"ignore_labels": [0, "O"]}),
    ("feature-extraction", {"padding": "max_length", "truncation": True}, {"padding": "max_length", "truncation": True}),
    ("object-detection", {"threshold": -1}, {"threshold": -1}),
    ("image-segmentation", {"threshold": 1.5, "mask_threshold": 2}, {"threshold": 1.5, "mask_threshold": 2}),
    ("text-to-audio", {"generation_config": {"top_k": 2}, "generate_kwargs": {"top_k": 3}}, {"generate_kwargs": {"top_k": 3}}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "given", "found"), VALUES, ids=lambda value: str(value)[:40])
def test_values_of_numpy_torch_and_transformers_are_those_of_json(task: str, given: Any, found: Any) -> None:
    assert called_parameters(task_spec(task), given) == found


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("text-generation", {"bad_words_ids": np.zeros((1000, 1000))}, "1000000 numbers"),
        ("text-generation", {"generation_config": GenerationConfig(max_time=3.0)}, "'max_time', which text-generation takes"),
        ("text-generation", {"tools": [{}]}, "chat template"),
        ("text-classification", {"generation_config": GenerationConfig(top_k=2)}, "takes no parameter 'generation_config'"),
        ("text-classification", {"top_k": object()}, "whole number"),
        ("text-classification", {"top_k": 2.5}, "whole number"),
        ("text-generation", {"max_new_tokens": float("inf")}, "whole number"),
        ("zero-shot-classification", {"multi_label": 2}, "true or false"),
        ("object-detection", {"threshold": float("nan")}, "must be a number"),
        ("automatic-speech-recognition", {"prompt_ids": []}, "list of 1 to 1000 values"),
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(task: str, given: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        called_parameters(task_spec(task), given)


SPEECH, CHAT = task_spec("automatic-speech-recognition"), task_spec("image-text-to-text")
LAYERS = [
    (SPEECH, {"num_beams": 2}, {"generate_kwargs": {"num_beams": 3}}, {"num_beams": 3}),
    (SPEECH, {"generate_kwargs": {"num_beams": 2, "task": "translate"}}, {"num_beams": 3},
     {"num_beams": 3, "task": "translate"}),
    (CHAT, {"generate_kwargs": {"num_beams": 2}}, {"generate_kwargs": {"do_sample": True}}, {"do_sample": True}),
    (CHAT, {"num_beams": 2}, {"generate_kwargs": {"do_sample": True}}, {"num_beams": 2, "do_sample": True}),
    (CHAT, {"num_beams": 2}, {"num_beams": None}, {"num_beams": None}),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "below", "called", "generation"), LAYERS)
def test_a_call_goes_before_its_pipeline_however_both_say_it(
    spec: Any, below: Any, called: Any, generation: Any
) -> None:
    found = layered(spec, below, called)
    assert {**found.pop("generate_kwargs", {}), **found} == generation


PIPELINE_AND_CALL = [
    ("automatic-speech-recognition", {"generate_kwargs": {"max_new_tokens": 3}}, {"generate_kwargs": {"num_beams": 2}},
     {"generate_kwargs": {"max_new_tokens": 3, "num_beams": 2}}),
    ("automatic-speech-recognition", {"num_beams": 4}, {"generate_kwargs": {"num_beams": 2}},
     {"generate_kwargs": {"num_beams": 2}}),
    ("feature-extraction", {"tokenize_kwargs": {"truncation": True}}, {"tokenize_kwargs": {"max_length": 3}},
     {"tokenize_kwargs": {"truncation": True, "max_length": 3}}),
    ("feature-extraction", {"truncation": True}, {"tokenize_kwargs": {"truncation": False}},
     {"tokenize_kwargs": {"truncation": False}}),
    ("image-feature-extraction", {"image_processor_kwargs": {"size": 8}}, {"image_processor_kwargs": {"resample": 2}},
     {"image_processor_kwargs": {"size": 8, "resample": 2}}),
    ("fill-mask", {"tokenizer_kwargs": {"truncation": True}}, {"tokenizer_kwargs": {"max_length": 3}},
     {"tokenizer_kwargs": {"max_length": 3}}),
    ("text-to-audio", {"generate_kwargs": {"do_sample": True, "top_k": 2}}, {"forward_params": {"do_sample": False}},
     {"generate_kwargs": {"top_k": 2}, "forward_params": {"do_sample": False}}),
    ("text-generation", {"stop_sequence": "a"}, {"stop_strings": ["b"]}, {"stop_strings": ["b"]}),
    ("text-generation", {"stop_sequence": "a"}, {"stop": ["b"]}, {"stop": ["b"]}),
    ("text-generation", {"return_full_text": False}, {"return_text": True}, {"return_full_text": False}),
    ("text-generation", {"return_full_text": False}, {"return_tensors": True}, {"return_tensors": True}),
    ("text-generation", {"return_tensors": True}, {"return_full_text": True}, {"return_full_text": True}),
    ("text-generation", {"return_text": True}, {"return_full_text": True}, {"return_full_text": True}),
    ("text-generation", {"return_full_text": False}, {"return_type": 2}, {"return_type": 2}),
    ("text-generation", {}, {"return_full_text": True, "return_text": True}, {"return_full_text": True, "return_text": True}),
    ("image-text-to-text", {"return_full_text": True}, {"return_tensors": True}, {"return_tensors": True}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "below", "called", "found"), PIPELINE_AND_CALL)
def test_what_a_call_does_not_say_stays_as_its_pipeline_says_it(task: str, below: Any, called: Any, found: Any) -> None:
    spec = task_spec(task)
    once = layered(spec, below, called)
    assert once == found
    assert layered(spec, below, once) == found


KEPT = [
    (
        "text-generation",
        {"return_full_text": False, "return_tensors": True, "prefix": "a", "stop_sequence": "b", "max_length": 9},
    ),
    ("text-classification", {"function_to_apply": "sigmoid"}),
    ("image-classification", {"top_k": 2, "function_to_apply": "sigmoid"}),
    ("video-classification", {"top_k": 2, "num_frames": 4}),
    ("token-classification", {"aggregation_strategy": "max", "ignore_labels": [], "stride": 2, "delimiter": "_"}),
    ("table-question-answering", {"sequential": True, "truncation": True}),
    ("automatic-speech-recognition", {"return_timestamps": "word", "chunk_length_s": 3.0, "stride_length_s": 1.0}),
    ("fill-mask", {"top_k": 2, "targets": ["a"], "tokenizer_kwargs": {"truncation": True}}),
    ("question-answering", {"top_k": 2}),
    ("document-question-answering", {"top_k": 2}),
    ("visual-question-answering", {"top_k": 2}),
    ("feature-extraction", {"return_tensors": True, "tokenize_kwargs": {"truncation": True}}),
    ("image-feature-extraction", {"pool": True}),
    ("translation", {"src_lang": "en", "tgt_lang": "fr"}),
    ("image-text-to-text", {"max_new_tokens": 3, "generate_kwargs": {"num_beams": 2}, "continue_final_message": True}),
    ("any-to-any", {"max_new_tokens": 3}),
    ("zero-shot-classification", {"candidate_labels": ["a"], "hypothesis_template": "{}"}),
]
LIFTED = [
    ("text-classification", {"top_k": 2, "truncation": True}),
    ("audio-classification", {"top_k": 2}),
    ("text-generation", {"max_new_tokens": 3, "temperature": 0.5, "padding": True}),
    ("automatic-speech-recognition", {"max_new_tokens": 3, "language": "fr", "prompt_ids": [3]}),
    ("summarization", {"max_new_tokens": 3}),
    ("zero-shot-classification", {"multi_label": True}),
    ("zero-shot-object-detection", {"top_k": 2}),
    ("image-segmentation", {"subtask": "panoptic"}),
]


@pytest.mark.parametrize(("task", "below"), KEPT)
def test_none_leaves_what_the_pipeline_says(task: str, below: Any) -> None:
    assert layered(task_spec(task), below, dict.fromkeys(below)) == below


@pytest.mark.parametrize(("task", "below"), LIFTED)
def test_none_goes_before_the_pipeline_where_it_has_a_meaning(task: str, below: Any) -> None:
    spec = task_spec(task)
    assert layered(spec, below, dict.fromkeys(below)) == dict.fromkeys(below)
    assert below.keys() <= spec.parameters.keys()


def test_a_none_that_says_nothing_does_not_reach_the_model() -> None:
    assert CHAT.settled({"max_new_tokens": None}) == {}
    assert task_spec("image-classification").settled({"top_k": None}) == {}


def test_the_languages_in_a_task_name_hold_beside_a_none() -> None:
    assert _checked("translation_en_to_fr", TASKS["translation_xx_to_yy"], {"src_lang": None, "tgt_lang": "de"}) == {
        "src_lang": "en",
        "tgt_lang": "de",
    }


def test_labels_of_a_pool_are_known_beside_a_none() -> None:
    known = Known({"candidate_labels": ["a"]}, complete=True).of_item({"candidate_labels": None})
    task_spec("zero-shot-classification").require("a text", known)


def test_a_generation_config_of_a_call_takes_the_place_of_its_pipelines_arguments() -> None:
    found = layered(SPEECH, {"num_beams": 4, "chunk_length_s": 30}, {"generation_config": GenerationConfig(top_k=3)})
    assert called_parameters(SPEECH, found) == {"chunk_length_s": 30, "top_k": 3}


def test_none_stands_for_what_holds_without_the_parameter_unless_it_has_a_meaning() -> None:
    assert task_spec("text-classification").settled({"top_k": None, "max_length": None}) == {"top_k": None}
    assert task_spec("text-generation").settled({"max_new_tokens": None, "prefix": None}) == {"max_new_tokens": None}


def test_a_result_that_transformers_gives_as_a_tensor_is_one() -> None:
    features = with_tensors([[[0.5, 1.0]]], ("",))
    assert torch.equal(features, torch.tensor([[[0.5, 1.0]]]))
    tokens = with_tensors([{"input_text": "x", "generated_token_ids": [3, 4]}], ("generated_token_ids",))
    assert tokens[0]["input_text"] == "x"
    assert torch.equal(tokens[0]["generated_token_ids"], torch.tensor([3, 4]))
    maps = with_tensors([np.zeros((1, 2, 4)), np.zeros((1, 4, 2))], ("",))
    assert [one.shape for one in maps] == [(1, 2, 4), (1, 4, 2)]
