"""What the producer lets through for the tasks with text and media, and how a call becomes an input."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.contract.references import is_ref
from pipefleet.errors import InputError, ParameterError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.pipelines.calls import arguments_of
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import task_spec
from tests.checkpoints.media import image

URI = "s3://bucket/a.png"
CHAT = [{"role": "user", "content": [{"type": "image", "url": URI}, {"type": "text", "text": "What?"}]}]
TEXT_CHAT = [{"role": "user", "content": "Hello"}]

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("image-text-to-text", {"max_new_tokens": 5, "stop": ["\n"], "seed": 1, "return_full_text": False}),
    ("image-text-to-text", {"generate_kwargs": {"do_sample": True, "temperature": 0.5, "num_return_sequences": 2}}),
    ("any-to-any", {"continue_final_message": True, "skip_special_tokens": False}),
    ("image-to-text", {"prompt": "a photo of", "max_new_tokens": 20, "generate_kwargs": {"num_beams": 4}}),
    ("vqa", {"top_k": 3, "truncation": True, "num_beams": 2}),
    (
        "document-question-answering",
        {"top_k": 3, "doc_stride": 16, "max_question_len": 8, "handle_impossible_answer": True},
    ),
    ("zero-shot-image-classification", {"candidate_labels": ["a", "b"], "hypothesis_template": "a photo of {}"}),
    ("zero-shot-object-detection", {"candidate_labels": "a,b", "threshold": 0.2, "top_k": None}),
]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("image-text-to-text", {"custom_generate": "/x"}),
    ("image-text-to-text", {"generate_kwargs": {"custom_generate": "/x", "trust_remote_code": True}}),
    ("image-text-to-text", {"generate_kwargs": {"stop": ["x"]}}),
    ("image-text-to-text", {"chat_template": "{{ 1 }}"}),
    ("image-text-to-text", {"processor_kwargs": {"chat_template": "x"}}),
    ("any-to-any", {"load_audio_from_video": True}),
    ("any-to-any", {"tools": []}),
    ("image-to-text", {"timeout": 3}),
    ("vqa", {"padding": "max_length"}),
    ("document-question-answering", {"lang": "eng"}),
    ("document-question-answering", {"tesseract_config": "--psm 6"}),
    ("document-question-answering", {"top_k": 0}),
    ("zero-shot-image-classification", {"hypothesis_template": "{:>3000000}"}),
    ("zero-shot-image-classification", {"hypothesis_template": "{0.__class__}"}),
    ("zero-shot-image-classification", {"hypothesis_template": "{} and {}"}),
    ("zero-shot-image-classification", {"hypothesis_template": "no place"}),
    ("zero-shot-image-classification", {"tokenizer_kwargs": {}}),
    ("zero-shot-object-detection", {"threshold": "2"}),
]


@pytest.mark.parametrize(("task", "parameters"), ACCEPTED)
def test_known_parameters_pass(task: str, parameters: dict[str, Any]) -> None:
    task_spec(task).check(parameters)


@pytest.mark.parametrize(("task", "parameters"), REFUSED)
def test_what_runs_code_renders_templates_or_reaches_a_command_line_does_not(
    task: str, parameters: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError):
        task_spec(task).check(parameters)


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any], Any, dict[str, Any]]] = [
    ("image-text-to-text", (CHAT,), {"seed": 1}, CHAT, {"seed": 1}),
    ("image-text-to-text", (), {"text": CHAT}, {"text": CHAT}, {}),
    ("image-text-to-text", (), {"text": [CHAT, TEXT_CHAT]}, [{"text": CHAT}, {"text": TEXT_CHAT}], {}),
    ("image-text-to-text", (URI,), {"text": "a"}, {"images": URI, "text": "a"}, {}),
    ("image-text-to-text", (), {"images": [URI, URI], "text": "a"}, {"images": [URI, URI], "text": "a"}, {}),
    (
        "image-text-to-text",
        ([URI, "b.png"], ["a", "b"]),
        {},
        [{"images": URI, "text": "a"}, {"images": "b.png", "text": "b"}],
        {},
    ),
    ("any-to-any", ("a",), {"audio": "x.wav"}, {"text": "a", "audio": "x.wav"}, {}),
    ("image-to-text", ([URI, "b.png"],), {}, [URI, "b.png"], {}),
    ("image-to-text", (), {"images": [URI, "b.png"]}, [{"images": URI}, {"images": "b.png"}], {}),
    ("vqa", (URI, "Who?"), {"top_k": 1}, {"image": URI, "question": "Who?"}, {"top_k": 1}),
    ("vqa", (URI,), {"question": ["Who?", "Why?"]}, [{"image": URI, "question": one} for one in ("Who?", "Why?")], {}),
    ("vqa", ({"image": URI, "question": "Who?"},), {}, {"image": URI, "question": "Who?"}, {}),
    ("document-question-answering", (URI,), {"question": "Who?"}, {"image": URI, "question": "Who?"}, {}),
    (
        "document-question-answering",
        (URI, "Who?", [["a", [0, 0, 1, 1]]]),
        {},
        {"image": URI, "question": "Who?", "word_boxes": [["a", [0, 0, 1, 1]]]},
        {},
    ),
    ("zero-shot-image-classification", (URI, ["a"]), {}, URI, {"candidate_labels": ["a"]}),
    ("zero-shot-object-detection", (URI,), {"candidate_labels": ["a"]}, URI, {"candidate_labels": ["a"]}),
    ("zero-shot-object-detection", (URI, ["a"]), {}, {"image": URI}, {"candidate_labels": ["a"]}),
]


@pytest.mark.parametrize(("task", "inputs", "parameters", "given", "wanted"), CALLS)
def test_calls_become_inputs_as_with_transformers(
    task: str, inputs: tuple[Any, ...], parameters: dict[str, Any], given: Any, wanted: dict[str, Any]
) -> None:
    assert arguments_of(task_spec(task), inputs, parameters) == (given, wanted)


@pytest.mark.parametrize(
    ("task", "inputs", "parameters"),
    [
        ("vqa", ({"image": URI},), {"question": "Who?"}),
        ("image-text-to-text", (), {"images": [URI] * 3, "text": ["a", "b"]}),
        ("vqa", (URI, "Who?"), {"question": "Why?"}),
    ],
)
def test_what_is_given_twice_or_does_not_match_is_refused(
    task: str, inputs: tuple[Any, ...], parameters: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        arguments_of(task_spec(task), inputs, parameters)


def test_media_inside_a_chat_travel_as_references(store: ObjectStore, prefix: str) -> None:
    preparer = InputPreparer(task_spec("image-text-to-text"), store, prefix, inline_bytes=1000)
    picture = {"type": "image", "image": image(8, 8)}
    (message,) = preparer.prepare([{"role": "user", "content": [picture, *CHAT[0]["content"]]}])
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert all(is_ref(part["image"]) for part in message["content"][:2])
    with pytest.raises(InputError, match="takes text, image in the parts"):
        preparer.prepare([{"role": "user", "content": [{"type": "audio", "audio": "s3://bucket/a.wav"}]}])


@pytest.mark.parametrize("task", ["vqa", "document-question-answering"])
def test_a_question_without_its_picture_is_refused(task: str, store: ObjectStore, prefix: str) -> None:
    with pytest.raises(InputError, match="image is missing"):
        InputPreparer(task_spec(task), store, prefix, inline_bytes=1000).prepare({"question": "Who?"})


def test_words_with_their_boxes_may_stand_for_a_page(store: ObjectStore, prefix: str) -> None:
    preparer = InputPreparer(task_spec("document-question-answering"), store, prefix, inline_bytes=1000)
    page = {"question": "Who?", "word_boxes": [["a", [0, 0, 1, 1]]]}
    assert preparer.prepare({"image": None, **page}) == preparer.prepare(page) == page
    with pytest.raises(InputError, match="image is missing"):
        preparer.prepare({"image": None, "question": "Who?"})
