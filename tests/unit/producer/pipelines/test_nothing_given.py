"""None for a field or a parameter that need not be given stands for a call without it, as in transformers."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.errors import InputError, ParameterError
from pipefleet.pipelines.calls import Beside, arguments_of
from pipefleet.tasks import TASKS, task_spec
from pipefleet.tasks.parameters import called_parameters, layered

URI = "s3://media/a.png"
CHAT = [{"role": "user", "content": "Hello"}]
BOXES = "document-question-answering"

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = [
    ("text-classification", ("a",), {"text_pair": None}, "a"),
    ("text-classification", (["a", "b"],), {"text_pair": None}, ["a", "b"]),
    ("text-classification", (), {"text": "a", "text_pair": None}, {"text": "a"}),
    ("any-to-any", (), {"text": "a", "images": None, "audio": None, "videos": None}, {"text": "a"}),
    ("any-to-any", ("a", None, None, URI), {}, {"text": "a", "audio": URI}),
    ("any-to-any", (CHAT,), {"images": None}, CHAT),
    ("any-to-any", (), {"text": ["a", "b"], "images": None}, [{"text": "a"}, {"text": "b"}]),
    ("image-text-to-text", (None,), {"text": "a"}, {"text": "a"}),
    ("image-text-to-text", (None, CHAT), {}, {"text": CHAT}),
    ("image-text-to-text", (URI,), {"text": None}, {"images": URI, "text": None}),
    ("image-to-text", (URI,), {"text": None}, URI),
    (BOXES, (URI, "q", None), {}, {"image": URI, "question": "q"}),
    ("visual-question-answering", (URI, None), {}, {"image": URI, "question": None}),
    ("zero-shot-object-detection", (URI, None), {}, {"image": URI}),
]


@pytest.mark.parametrize(("task", "inputs", "parameters", "given"), CALLS)
def test_a_field_that_is_none_is_not_given(
    task: str, inputs: tuple[Any, ...], parameters: dict[str, Any], given: Any
) -> None:
    found, rest = arguments_of(task_spec(task), inputs, parameters)
    assert found == given
    assert "text_pair" not in parameters or not isinstance(found, Beside)
    assert {name: one for name, one in rest.items() if one is not None} == {}


@pytest.mark.parametrize("task", sorted(name for name, spec in TASKS.items() if spec.fields))
def test_a_dict_may_hold_none_for_what_is_not_required_and_only_there(client: Client, task: str) -> None:
    spec = task_spec(task)
    good = {"text": "a", "image": URI, "images": URI, "question": "q", "context": "c", "state": {}, "questions": {},
            "query": "q", "table": {"a": ["1"]}}  # fmt: skip
    needed = [*spec.required] or ["image"]
    preparer = client.preparer(spec, None, {"candidate_labels": ["x"]})
    filled = {name: good[name] for name in needed}
    nothing = {name: None for name in spec.fields if name not in needed}
    assert preparer.prepare({**filled, **nothing}) == preparer.prepare(filled)
    for name in needed if task != "decision" else ():  # a state may be null
        with pytest.raises(InputError):
            preparer.prepare({**filled, name: None})


REFUSED = [
    ("text-generation", "streamer"),
    ("text-generation", "stopping_criteria"),
    ("text-generation", "logits_processor"),
    ("text-generation", "tools"),
    ("image-text-to-text", "processor_kwargs"),
    ("token-classification", "offset_mapping"),
    ("automatic-speech-recognition", "decoder_kwargs"),
    ("document-question-answering", "tesseract_config"),
    ("zero-shot-image-classification", "tokenizer_kwargs"),
    ("image-classification", "timeout"),
]


@pytest.mark.parametrize(("task", "name"), REFUSED)
def test_none_for_a_refused_parameter_is_a_call_without_it(task: str, name: str) -> None:
    spec = task_spec(task)
    assert called_parameters(spec, {name: None}) == {}
    assert layered(spec, {}, called_parameters(spec, {name: None})) == {}
    with pytest.raises(ParameterError, match="takes no parameter"):
        called_parameters(spec, {name: 1})


@pytest.mark.parametrize("task", ["image-text-to-text", "automatic-speech-recognition", "text-to-audio"])
@pytest.mark.parametrize("inside", ["generate_kwargs", "generation_config"])
def test_none_for_a_refused_argument_of_generate_is_left_out_wherever_it_stands(task: str, inside: str) -> None:
    spec, given = task_spec(task), {"max_time": None, "logits_processor": None, "max_new_tokens": 3}
    found = called_parameters(spec, {inside: given})
    assert found == ({inside: {"max_new_tokens": 3}} if inside == "generate_kwargs" else {"max_new_tokens": 3})
    with pytest.raises(ParameterError, match="max_time"):
        called_parameters(spec, {inside: {**given, "max_time": 1.0}})


def test_none_for_a_name_that_nobody_knows_is_refused() -> None:
    for given in ({"banana": None}, {"generate_kwargs": {"banana": None}}):
        with pytest.raises(ParameterError, match="banana"):
            called_parameters(task_spec("image-text-to-text"), given)


@pytest.mark.parametrize(("task", "given"), [(BOXES, {}), ("automatic-speech-recognition", {"max_new_tokens": 3})])
def test_one_sequence_is_what_a_call_gives_without_asking(task: str, given: dict[str, Any]) -> None:
    assert called_parameters(task_spec(task), {"num_return_sequences": 1, **given}) == given
    with pytest.raises(ParameterError, match="num_return_sequences"):
        called_parameters(task_spec(task), {"num_return_sequences": 2})


def test_one_sequence_is_left_out_inside_of_generate_kwargs_too() -> None:
    found = called_parameters(
        task_spec("automatic-speech-recognition"), {"generate_kwargs": {"num_return_sequences": 1}}
    )
    assert found == {"generate_kwargs": {}}
