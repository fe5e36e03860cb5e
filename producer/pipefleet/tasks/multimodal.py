"""The rows of tasks that bring text together with pictures, sound or video."""

from __future__ import annotations

from typing import Any

from pipefleet.tasks.checks import Check, boolean, either, integer, mapping_of, null, template, text
from pipefleet.tasks.generation import GENERATION, SEED, STOP, generation_without
from pipefleet.tasks.refused import REASONS
from pipefleet.tasks.requirements import (
    asked_once,
    boxes_on_page,
    labels_given,
    media_in_chat,
    one_way_of_showing,
    picture_given,
    prompt_filled,
    writable,
)
from pipefleet.tasks.shared import (
    ANY_LABELS,
    CANDIDATE_LABELS,
    PADDING,
    SHOWN,
    STRICT_MEDIA,
    SWITCHES,
    THRESHOLD,
    TOKENIZE,
    WRITE,
)
from pipefleet.tasks.spec import Media, TaskSpec

_GENERATE_KWARGS = mapping_of(GENERATION)
_CHAT: dict[str, Check] = {
    **WRITE,
    **{name: check for name, check in SHOWN.items() if name != "return_text"},
    "generate_kwargs": _GENERATE_KWARGS,
    **{name: TOKENIZE[name] for name in ("truncation", "add_special_tokens")},
    "padding": PADDING,
    **SWITCHES,
}
_CHAT_RETURNS = (
    "[{input_text, generated_text}], where the messages of a chat name their media ({type}) without holding them"
)
_ANSWERS = integer(1, 10_000)


def _text_mode(value: Any) -> str | None:
    """The mode in which a model writes text."""
    return None if value == "text" else f'must be "text": {REASONS["generation_mode"]}'


ROWS = (
    TaskSpec(
        name="image-text-to-text",
        media=Media.PROMPT,
        fields={"images": Media.IMAGES, "text": Media.PROMPT},
        required=("text",),
        positional=("images", "text"),
        chat_media=(Media.TEXT, Media.IMAGE),
        parameters=_CHAT,
        nones=frozenset(GENERATION) - {"max_new_tokens"},
        returns=_CHAT_RETURNS,
        tensors=("generated_token_ids",),
        requires=(prompt_filled, media_in_chat, asked_once, one_way_of_showing, writable),
    ),
    TaskSpec(
        name="any-to-any",
        media=Media.PROMPT,
        fields={"text": Media.PROMPT, "images": Media.IMAGES, "videos": Media.VIDEOS, "audio": Media.AUDIOS},
        required=("text",),
        positional=("text", "images", "videos", "audio"),
        chat_media=(Media.TEXT, Media.IMAGE, Media.AUDIO, Media.VIDEO),
        parameters={**_CHAT, **STRICT_MEDIA, "generation_mode": _text_mode},
        nones=frozenset(GENERATION) - {"max_new_tokens"},
        returns=_CHAT_RETURNS,
        tensors=("generated_token_ids",),
        requires=(prompt_filled, media_in_chat, asked_once, one_way_of_showing, writable),
    ),
    TaskSpec(
        name="image-to-text",
        media=Media.IMAGE,
        fields={"image": Media.IMAGE, "images": Media.IMAGE, "text": Media.TEXT},
        parameters={
            **WRITE,
            "prompt": text(10_000),
            "generate_kwargs": _GENERATE_KWARGS,
        },
        nones=frozenset(GENERATION) - {"max_new_tokens"},
        returns="[{generated_text}]",
        requires=(picture_given, asked_once, writable),
    ),
    TaskSpec(
        name="visual-question-answering",
        aliases=("vqa",),
        media=None,
        fields={"image": Media.IMAGE, "question": Media.TEXT},
        required=("image", "question"),
        positional=("image", "question"),
        crosses=True,
        # top_k counts answers here, so a model that writes them samples without it.
        parameters={**WRITE, "top_k": _ANSWERS, "truncation": boolean, "padding": PADDING},
        nones=frozenset(GENERATION) - {"top_k"},
        returns="[{score, answer}], or [{answer}] from a model that writes",
    ),
    TaskSpec(
        name="document-question-answering",
        media=None,
        fields={"image": Media.IMAGE, "question": Media.TEXT, "word_boxes": Media.DATA},
        required=("image", "question"),
        instead={"image": "word_boxes"},
        positional=("image", "question", "word_boxes"),
        parameters={
            **generation_without("num_return_sequences"),
            **STOP,
            **SEED,
            "top_k": _ANSWERS,
            "doc_stride": integer(0, 100_000),
            "max_answer_len": integer(1, 100_000),
            "max_seq_len": integer(1, 100_000),
            "max_question_len": integer(1, 100_000),
            "handle_impossible_answer": boolean,
        },
        nones=frozenset(GENERATION) - {"top_k"},
        returns="[{score, answer, start, end}], or [{answer}] from a model that reads the page itself",
        requires=(boxes_on_page,),
    ),
    TaskSpec(
        name="zero-shot-image-classification",
        media=Media.IMAGE,
        positional=("image", "candidate_labels"),
        parameters={"candidate_labels": CANDIDATE_LABELS, "hypothesis_template": template(1000)},
        returns="[{score, label}]",
        requires=(labels_given,),
    ),
    TaskSpec(
        name="zero-shot-object-detection",
        media=Media.IMAGE,
        fields={"image": Media.IMAGE, "candidate_labels": Media.LABELS},
        required=("image",),
        positional=("image", "candidate_labels"),
        renamed={"text_queries": "candidate_labels"},
        parameters={
            "candidate_labels": ANY_LABELS,
            "threshold": THRESHOLD,
            "top_k": either(null, integer(1, 100_000)),
        },
        nones=frozenset({"top_k"}),
        returns="[{score, label, box: {xmin, ymin, xmax, ymax}}]",
        requires=(labels_given,),
    ),
)
