"""Tasks that bring text together with pictures, sound or video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipefleet.tasks.generation import GENERATION
from pipefleet_workers.adapters.writing.parameters import generation_of
from tests.checkpoints import CHECKPOINTS
from tests.checkpoints.inputs import GREEDY
from tests.checkpoints.media import image
from tests.parity.cases.case import Case, direct
from tests.parity.harness import Call


def told(pipe: Any, call: Call) -> Any:
    """The pipeline's records, with the media of a chat named but left out: what a worker writes."""
    return [{name: without_media(value) for name, value in record.items()} for record in whole(pipe, call)]


def whole(pipe: Any, call: Call) -> Any:
    """The pipeline's records as they are: what a call of the fleet gives back."""
    parameters = dict(call.parameters)
    if "stop" in parameters:
        parameters["stop_sequence"] = parameters.pop("stop")
    return _called(pipe, Call(call.inputs, parameters))


def _called(pipe: Any, call: Call) -> Any:
    if isinstance(call.inputs, dict):
        parameters = {**call.parameters, **call.inputs}
        return direct(
            lambda given, **rest: pipe(**given, **rest), Call(dict(call.inputs), _rest(parameters, call.inputs))
        )
    return direct(lambda given, **rest: pipe(text=given, **rest), call)


def _rest(parameters: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in fields}


def without_media(value: Any) -> Any:
    value = getattr(value, "messages", value)
    if not isinstance(value, list):
        return value
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [part if part["type"] == "text" else {"type": part["type"]} for part in message["content"]],
        }
        for message in value
    ]


def mixed_prompts(folder: Path) -> list[Any]:
    """Chats with one, no and two pictures, a chat that is to be gone on with, and texts with and without pictures."""
    chats = CHECKPOINTS["image-text-to-text"].inputs(folder)
    two = [{"type": "image", "image": image(90, 40, 2)}, {"type": "image", "image": image(40, 90, 1)}]
    both = [{"role": "user", "content": [*two, {"type": "text", "text": "Which is wider?"}]}]
    begun = [*chats[0], {"role": "assistant", "content": [{"type": "text", "text": "It shows a"}]}]
    pair = {"images": [image(50, 60, 1), image(70, 30)], "text": "<image> or <image>?"}
    return [
        *chats[1:3],
        chats[4],
        both,
        begun,
        pair,
        {"images": image(64, 48), "text": "A photo <image> of"},
        "The sea",
    ]


def sounds(folder: Path) -> list[Any]:
    """The checkpoint's chats, and a text with a sound beside it."""
    chats = CHECKPOINTS["any-to-any"].inputs(folder)
    wave = chats[0][0]["content"][0]["audio"]
    return [*chats, {"text": "Hear <|audio_bos|><|AUDIO|><|audio_eos|> this.", "audio": wave}]


def captions(folder: Path) -> list[Any]:
    """Pictures alone, and with beginnings of equal and of unequal length."""
    prompted = CHECKPOINTS["image-to-text"].inputs(folder)
    more = [{"image": image(50, 40, 3), "text": "a cat"}, {"image": image(20, 40, 1), "text": "two dogs"}]
    return [*(one["images"] for one in prompted), *prompted, *more]


def caption(pipe: Any, call: Call) -> Any:
    """By hand from the model, beside what the pipeline of our own gives."""
    record = direct(pipe, call)
    given = call.inputs if isinstance(call.inputs, dict) else {"image": call.inputs}
    picture, text = given.get("image", given.get("images")), given.get("text", call.parameters.get("prompt"))
    inputs = dict(pipe.image_processor(picture, return_tensors="pt"))
    if text is not None and pipe.model.config.model_type == "blip":
        inputs |= {name: pipe.tokenizer(text, return_tensors="pt")[name] for name in ("input_ids", "attention_mask")}
    elif text is not None:
        inputs["decoder_input_ids"] = pipe.tokenizer(text, return_tensors="pt")["input_ids"]
    arguments = dict(call.parameters.get("generate_kwargs", {}))
    arguments |= {"max_new_tokens": call.parameters["max_new_tokens"]} if "max_new_tokens" in call.parameters else {}
    with torch.inference_mode():
        sequences = pipe.model.generate(**inputs, **arguments)
    assert record == [{"generated_text": pipe.tokenizer.decode(one, skip_special_tokens=True)} for one in sequences]
    return record


def answers(pipe: Any, call: Call) -> Any:
    """By hand from the model, beside what the pipeline of our own gives."""
    record = direct(pipe, call)
    question = pipe.tokenizer(call.inputs["question"], return_tensors="pt")
    inputs = {**question, **pipe.image_processor(call.inputs["image"], return_tensors="pt")}
    with torch.inference_mode():
        scores = pipe.model(**inputs).logits[0].sigmoid()
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: call.parameters.get("top_k", 5)]
    assert [one["answer"] for one in record] == [pipe.model.config.id2label[index] for index in best]
    return record


def pages(folder: Path) -> list[Any]:
    """Pages with words; one of a single word."""
    found = CHECKPOINTS["document-question-answering"].inputs(folder)
    return [*found, {**found[0], "word_boxes": found[0]["word_boxes"][:1], "question": "What?"}]


def nested_keywords(pipe: Any, call: Call) -> Any:
    """transformers takes arguments of generate() inside `generate_kwargs` alone, but for one."""
    names = {name for name in GENERATION if name != "max_new_tokens"}
    rest = {name: value for name, value in call.parameters.items() if name not in names}
    moved = {name: value for name, value in call.parameters.items() if name in names}
    if moved:
        rest["generate_kwargs"] = {**rest.get("generate_kwargs", {}), **generation_of(moved, None)}
    return told(pipe, Call(call.inputs, rest))


def set_aside(pipe: Any, call: Call) -> Any:
    """transformers takes arguments of generate() of this task in pipeline() alone."""
    before = pipe._generate_kwargs
    pipe._generate_kwargs = dict(call.parameters)
    try:
        return direct(pipe, Call(call.inputs))
    finally:
        pipe._generate_kwargs = before


def equal_questions(folder: Path) -> list[Any]:
    """Donut's prompts share a batch where they have the same number of tokens."""
    found = CHECKPOINTS["document-question-answering:donut"].inputs(folder)
    return [{**one, "question": question} for one, question in zip(found, ("a?", "b?", "Q?", "3?"), strict=True)]


def found_labels(pipe: Any, call: Call) -> Any:
    """One label at a time, as transformers looks for them; labels may stand in the call."""
    parameters = dict(call.parameters)
    given = parameters.pop("candidate_labels", None)
    fields = call.inputs if isinstance(call.inputs, dict) else {"image": call.inputs, "candidate_labels": given}
    return direct(pipe, Call({"candidate_labels": given, **fields}, parameters))


_CHAT, _ANY = "image-text-to-text", "any-to-any"
_NAMED, _SOUGHT = "zero-shot-image-classification", "zero-shot-object-detection"
_PAGES, _CAPTION = "document-question-answering", "image-to-text"
_BEAMS = {"num_beams": 2, "do_sample": False, "max_new_tokens": 5}

CASES = (
    Case(_CHAT, expected=told, ragged=True, shares=5),
    Case(
        _CHAT,
        [
            {"generate_kwargs": GREEDY, "return_full_text": False},
            {"max_new_tokens": 3},
            {"max_new_tokens": 12, "stop": ["e"], "skip_special_tokens": False},
        ],
        "mixed",
        mixed_prompts,
        expected=told,
        ragged=True,
        shares=16,
    ),
    Case(
        _CHAT,
        [
            {"generate_kwargs": _BEAMS},
            {"generate_kwargs": {**_BEAMS, "num_return_sequences": 2}, "return_full_text": False},
            {"generate_kwargs": {"repetition_penalty": 2.0, "max_new_tokens": 6}},
        ],
        "beams",
        expected=told,
        ragged=True,
        shares=5,
    ),
    Case(
        _CHAT,
        [
            {"do_sample": False, "max_new_tokens": 6, "stop_sequence": "e"},
            {"num_beams": 2, "max_new_tokens": 5, "return_tensors": True},
            {"generate_kwargs": {"num_beams": 3, "max_new_tokens": 5}, "num_beams": 1, "repetition_penalty": 2},
            {"max_new_tokens": 5, "clean_up_tokenization_spaces": True, "suppress_tokens": [70, 71]},
        ],
        "keywords",
        mixed_prompts,
        expected=nested_keywords,
        ragged=True,
        shares=5,
    ),
    Case(_ANY, expected=told, ragged=True, shares=4),
    Case(
        _ANY,
        [{"generate_kwargs": GREEDY, "return_full_text": False}, {"max_new_tokens": 3, "stop": ["a"]}],
        "texts",
        sounds,
        expected=told,
        ragged=True,
        shares=5,
    ),
    Case(_CAPTION, inputs=captions, expected=caption),
    Case(
        _CAPTION,
        [{"max_new_tokens": 4}, {"max_new_tokens": 7, "generate_kwargs": {"num_beams": 2, "num_return_sequences": 2}}],
        "parameters",
        captions,
        expected=caption,
    ),
    Case(
        f"{_CAPTION}:vit-gpt2",
        [{}, {"max_new_tokens": 6}, {"generate_kwargs": GREEDY, "prompt": "The"}],
        expected=caption,
        shares=4,
    ),
    Case("visual-question-answering", [{}, {"top_k": 2}, {"top_k": 100}], expected=answers, ragged=True, shares=12),
    Case("visual-question-answering:blip", [{"max_new_tokens": 4}, {"max_new_tokens": 6, "num_beams": 2}], shares=2),
    Case(
        _PAGES,
        [
            {},
            {"top_k": 3, "max_answer_len": 2},
            {"top_k": 2, "handle_impossible_answer": True},
            {"max_seq_len": 40, "doc_stride": 8},
        ],
        inputs=pages,
        ragged=True,
        shares=16,
    ),
    Case(f"{_PAGES}:donut", shares=1),
    Case(
        f"{_PAGES}:donut",
        [{"max_new_tokens": 3}, {"num_beams": 2, "max_new_tokens": 6}, {"max_new_tokens": 6, "suppress_tokens": [70]}],
        "keywords",
        equal_questions,
        expected=set_aside,
        shares=4,
    ),
    Case(f"{_PAGES}:donut", [{}, {"top_k": 3}], "equal", equal_questions, shares=8),
    Case(
        _NAMED,
        [
            {"candidate_labels": ["a cat", "a dog", "a red boat"]},
            {"candidate_labels": ["winter"]},
            {
                "candidate_labels": ["a dog", "the wide and empty sea at night", "a cat", "bread"],
                "hypothesis_template": "{}!",
            },
            {"candidate_labels": ["a dog", "two"], "hypothesis_template": "a drawing of {}"},
        ],
        shares=16,
    ),
    Case(f"{_NAMED}:siglip", [{"candidate_labels": ["a cat", "a dog"]}, {"candidate_labels": ["rain"]}], shares=6),
    Case(_SOUGHT, expected=found_labels, shares=4),
    Case(
        _SOUGHT,
        [
            {"threshold": 0.0, "top_k": 30, "candidate_labels": ["a bird", "sky"]},
            {"threshold": 0.02, "candidate_labels": "bird,tree"},
            {"threshold": 0.01, "top_k": None, "candidate_labels": [f"thing {index}" for index in range(20)]},
        ],
        "labels",
        CHECKPOINTS["zero-shot-image-classification"].inputs,
        expected=found_labels,
        shares=8,
    ),
)
