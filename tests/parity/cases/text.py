"""Tasks whose input is text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import CHECKPOINTS
from tests.parity.cases.case import Case, direct
from tests.parity.harness import Call


def pooled(pipe: Any, call: Call) -> Any:
    """Pooling by hand over the token matrix of the pipeline."""
    parameters = dict(call.parameters)
    pooling, normalize = parameters.pop("pooling", None), parameters.pop("normalize", False)
    matrix = np.asarray(pipe(call.inputs, **parameters), np.float64)
    ways = {"mean": lambda: matrix[0].mean(0), "cls": lambda: matrix[0, 0], "last": lambda: matrix[0, -1]}
    value = ways[pooling]() if pooling else matrix
    return value / np.linalg.norm(value, axis=-1, keepdims=True) if normalize else value


def written(pipe: Any, call: Call) -> Any:
    """The pipeline's own name for `stop` is `stop_sequence`."""
    names = {"stop": "stop_sequence"}
    return direct(pipe, Call(call.inputs, {names.get(name, name): value for name, value in call.parameters.items()}))


def short_texts(folder: Path) -> list[Any]:
    """Texts that fit the model without truncation."""
    return [text[:150] for text in CHECKPOINTS["feature-extraction"].inputs(folder)]


def pairs(_: Path) -> list[Any]:
    return [
        {"text": "A cat sleeps.", "text_pair": "An animal rests on the red couch."},
        {"text": "The delivery was fast, but the packaging was the worst.", "text_pair": "No."},
        {"text": "ok", "text_pair": "ok"},
    ]


_WRITING = "text-generation"
_BEAMS = {"do_sample": False, "num_beams": 3, "max_new_tokens": 7}

CASES = (
    Case("feature-extraction", ragged=True, shares=6),
    Case(
        "feature-extraction",
        [{"truncation": True}, {"tokenize_kwargs": {"truncation": True, "max_length": 9}}],
        "cut",
        ragged=True,
    ),
    Case(
        "feature-extraction",
        [
            {"pooling": pooling, "normalize": normalize}
            for pooling in (None, "mean", "cls", "last")
            for normalize in (False, True)
        ],
        "pooled",
        short_texts,
        expected=pooled,
        ragged=True,
    ),
    Case("text-classification", ragged=True, shares=6),
    Case(
        "text-classification",
        [
            {},
            {"top_k": 1},
            {"top_k": 2},
            {"top_k": None},
            {"function_to_apply": "sigmoid"},
            {"function_to_apply": "none", "top_k": None},
            {"truncation": True, "max_length": 8},
        ],
        "parameters",
        short_texts,
        ragged=True,
    ),
    Case(
        "text-classification", [{}, {"top_k": 2}, {"truncation": True, "max_length": 12}], "pairs", pairs, ragged=True
    ),
    Case(
        _WRITING,
        [
            {"do_sample": False, "max_new_tokens": 3},
            {"do_sample": False, "max_new_tokens": 20},
            {"do_sample": False, "max_new_tokens": 12, "return_full_text": False},
            {"do_sample": False, "max_new_tokens": 25, "stop": ["e", "the"]},
            {"do_sample": False, "max_new_tokens": 25, "stop": ["a"], "return_full_text": False},
            {"do_sample": False, "max_length": 250},
            {"do_sample": False, "max_new_tokens": 9, "add_special_tokens": True},
        ],
        expected=written,
        ragged=True,
        shares=30,
    ),
    Case(
        _WRITING,
        [
            {"do_sample": False, "max_new_tokens": 9, "repetition_penalty": 1.7},
            {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.7},
            {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9},
            {"do_sample": False, "max_new_tokens": 14, "no_repeat_ngram_size": 1},
        ],
        "penalties",
        ragged=True,
        shares=6,
    ),
    Case(
        _WRITING,
        [
            _BEAMS,
            {**_BEAMS, "num_return_sequences": 2},
            {**_BEAMS, "length_penalty": 2.0, "early_stopping": True},
            {**_BEAMS, "stop": ["e"], "early_stopping": "never"},
        ],
        "beams",
        expected=written,
        ragged=True,
        shares=6,
    ),
)
