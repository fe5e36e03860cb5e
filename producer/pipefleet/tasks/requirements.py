"""Checks of an input together with its parameters, as far as they need no model.

An input and the known parameters come in. A check raises InputError or ParameterError for an input that can only fail. The
producer calls them before it queues; workers keep checks of their own, for messages of other programs. An input that
transformers takes passes: an empty text is fine for most tasks. The content of an object (a reference, a path) is not looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipefleet.contract.references import is_ref, is_text_uri
from pipefleet.errors import InputError, ParameterError


@dataclass(frozen=True, slots=True)
class Known:
    """The known parameters of an input. `complete` says that the pool adds no others."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    complete: bool = False

    def of_item(self, own: Mapping[str, Any] | None) -> Known:
        """The same with the parameters of one item, which win over those of the call."""
        if not own:
            return self
        said = {name: value for name, value in own.items() if value is not None}
        return Known({**self.parameters, **said}, self.complete) if said else self


Requirement = Callable[[str, Any, Known], None]
"""A check: it takes the name of the task, an input and the known parameters. Raises InputError or ParameterError."""


def text_filled(task: str, inputs: Any, known: Known) -> None:
    """An input that is a text is not empty."""
    if isinstance(inputs, str) and not inputs:
        raise InputError(f"{task} takes a text that is not empty")


def text_not_blank(task: str, inputs: Any, known: Known) -> None:
    """The text has more than spaces: it must hold a mask."""
    if isinstance(inputs, str) and not inputs.strip():
        raise InputError(f"{task} takes a text with a mask in it, and the text is empty")


def fields_filled(*names: str) -> Requirement:
    """The texts in these fields are not empty."""

    def check(task: str, inputs: Any, known: Known) -> None:
        for name in names:
            value = inputs.get(name) if isinstance(inputs, Mapping) else None
            if isinstance(value, str) and not value:
                raise InputError(f"{task} takes a {name} that is not empty")

    return check


def prompt_filled(task: str, inputs: Any, known: Known) -> None:
    """The input has a prompt, or media beside it."""
    text = inputs.get("text") if isinstance(inputs, Mapping) and set(inputs) == {"text"} else inputs
    if isinstance(text, str) and not text:
        raise InputError(f"the prompt of {task} is empty")


def media_in_chat(task: str, inputs: Any, known: Known) -> None:
    """Media of a chat stand inside its messages, and not beside them."""
    if isinstance(inputs, Mapping) and isinstance(inputs.get("text"), list | tuple) and len(inputs) > 1:
        raise InputError(f"{task} takes the media of a chat inside its messages, not beside them")


def asked_once(task: str, inputs: Any, known: Known) -> None:
    """No parameter is given twice, as far as transformers refuses it."""
    asked, nested = known.parameters, known.parameters.get("generate_kwargs")
    if "max_new_tokens" in asked and isinstance(nested, Mapping) and "max_new_tokens" in nested:
        raise ParameterError(f"max_new_tokens of {task} is given twice, once in generate_kwargs; pass it once")


def picture_given(task: str, inputs: Any, known: Known) -> None:
    """A dict holds a picture, under `image` or `images`."""
    if isinstance(inputs, Mapping) and inputs.keys() <= {"text"}:
        raise InputError(f"{task} takes a dict of image and, if wanted, text; image is missing")


def labels_given(task: str, inputs: Any, known: Known) -> None:
    """Candidate labels come with the call, with the input, or from the pool."""
    own = isinstance(inputs, Mapping) and inputs.get("candidate_labels") is not None
    if known.complete and not own and known.parameters.get("candidate_labels") is None:
        raise ParameterError(f"{task} needs candidate_labels: a list of texts, or one text with commas")


def one_way_of_showing(task: str, inputs: Any, known: Known) -> None:
    """The parameters that say how a written text is shown do not contradict each other."""
    said = {name for name, value in known.parameters.items() if value is not None}
    if "return_type" in said:
        return
    both = [
        ("return_full_text", "return_text"),
        ("return_full_text", "return_tensors"),
        ("return_tensors", "return_text"),
    ]
    for one, other in both:
        if {one, other} <= said:
            raise ParameterError(f"{task} takes {one} or {other}, not both")


def writable(task: str, inputs: Any, known: Known) -> None:
    """The arguments of generate() that stand side by side go together, whatever the model."""
    said = {**(known.parameters.get("generate_kwargs") or {}), **known.parameters}
    beams, sequences, sampled = (said.get(name) for name in ("num_beams", "num_return_sequences", "do_sample"))
    if beams and sequences and 1 < beams < sequences:
        raise ParameterError(
            f"{task} gives at most num_beams sequences: num_return_sequences is {sequences} and num_beams {beams}"
        )
    if beams == 1 and sampled is False and sequences and sequences > 1:
        raise ParameterError(
            f"{task} with do_sample=False and num_beams=1 gives one sequence, not num_return_sequences={sequences}"
        )
    if sampled and said.get("temperature") == 0:
        raise ParameterError(
            f"{task} with do_sample=True takes a temperature above 0; pass do_sample=False for the most probable tokens"
        )


def one_truncation(task: str, inputs: Any, known: Known) -> None:
    """How a text is cut is said once."""
    own = known.parameters.get("tokenize_kwargs") or {}
    if known.parameters.get("truncation") is not None and "truncation" in own:
        raise ParameterError(f"{task} takes truncation or a truncation in tokenize_kwargs, not both")


def words_or_text(task: str, inputs: Any, known: Known) -> None:
    """A list of words comes with `is_split_into_words`, a text without it."""
    split = known.parameters.get("is_split_into_words")
    if isinstance(inputs, str) and split is True:
        raise InputError(f"{task} takes lists of words with is_split_into_words, not a text")
    if isinstance(inputs, list | tuple) and not split and (known.complete or split is False):
        raise InputError(f"{task} takes texts; pass is_split_into_words=True with lists of words")


def pieces_longer_than_strides(task: str, inputs: Any, known: Known) -> None:
    """Pieces of a recording are longer than the strides at both their ends, so that each piece adds to the recording."""
    length, stride = known.parameters.get("chunk_length_s"), known.parameters.get("stride_length_s")
    if not length or stride is None:
        return
    both = [stride, stride] if isinstance(stride, int | float) else list(stride)
    if len(both) != 2:
        raise ParameterError(f"stride_length_s of {task} is a number, or a list of two: the left and the right one")
    if sum(both) >= length:
        raise ParameterError(
            f"chunk_length_s of {task} is {length:g}, no longer than the strides at both its ends ({sum(both):g}); "
            "pass a longer chunk_length_s or a shorter stride_length_s"
        )


def boxes_on_page(task: str, inputs: Any, known: Known) -> None:
    """`word_boxes`, if given, are words with boxes in thousandths of the page."""
    boxes = inputs.get("word_boxes") if isinstance(inputs, Mapping) else None
    if boxes is None or is_ref(boxes):
        return
    if not (isinstance(boxes, list | tuple) and all(map(_is_boxed, boxes))):
        raise InputError(
            "word_boxes are a list of [word, [x0, y0, x1, y1]] with 0 <= x0 <= x1 <= 1000 and 0 <= y0 <= y1 <= 1000"
        )


def request_in_json(task: str, inputs: Any, known: Known) -> None:
    """A text is the JSON of a request."""
    if not isinstance(inputs, str) or is_text_uri(inputs):
        return
    try:
        request = json.loads(inputs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"a text for {task} must be the JSON of a request: {error}") from None
    if not isinstance(request, Mapping) or set(request) != {"state", "questions"}:
        raise InputError(f"a request of {task} has a state and questions, and nothing else")


def _is_boxed(one: Any) -> bool:
    if not isinstance(one, list | tuple) or len(one) != 2 or not isinstance(one[0], str):
        return False
    box = one[1]
    if not isinstance(box, list | tuple) or len(box) != 4 or not all(map(_is_finite, box)):
        return False
    left, top, right, bottom = box
    return bool(0 <= left <= right <= 1000 and 0 <= top <= bottom <= 1000)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
