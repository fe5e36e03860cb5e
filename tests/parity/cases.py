"""The table of parity cases: one row a checkpoint, with every set of parameters that takes another way through the worker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import CHECKPOINTS
from tests.checkpoints.media import audio
from tests.parity.harness import Call

Maker = Callable[[Path], list[Any]]
Expected = Callable[[Any, Call], Any]


def direct(pipe: Any, call: Call) -> Any:
    """What transformers returns for one call: the pipeline gets copies, since it empties what it is given."""
    return pipe(copy.deepcopy(call.inputs), **copy.deepcopy(dict(call.parameters)))


@dataclass(frozen=True)
class Case:
    """One row.

    `inputs` makes the inputs, each called with each of `parameters` (both the checkpoint's own by default); `expected` says
    what one call must return. `shares` is the least number of units that some batch must hold when all calls run together (1
    where the model cannot be batched), `ragged` that units of unequal length must have met in a batch.
    """

    checkpoint: str
    parameters: Sequence[dict[str, Any]] | None = None
    name: str = ""
    inputs: Maker | None = None
    expected: Expected = direct
    shares: int = 2
    ragged: bool = False

    @property
    def task(self) -> str:
        return self.checkpoint.partition(":")[0]

    @property
    def id(self) -> str:
        return f"{self.checkpoint}{'-' if self.name else ''}{self.name}"

    def calls(self, folder: Path) -> list[Call]:
        """Every input with every set of parameters, neighbours of different parameters."""
        row = CHECKPOINTS[self.checkpoint]
        inputs = (self.inputs or row.inputs)(folder)
        return [Call(one, own) for one in inputs for own in self.parameters or [row.parameters]]


def pooled(pipe: Any, call: Call) -> Any:
    """Pooling by hand over the token matrix of the pipeline."""
    parameters = dict(call.parameters)
    pooling, normalize = parameters.pop("pooling", None), parameters.pop("normalize", False)
    matrix = np.asarray(pipe(call.inputs, **parameters), np.float64)
    ways = {"mean": lambda: matrix[0].mean(0), "cls": lambda: matrix[0, 0], "last": lambda: matrix[0, -1]}
    value = ways[pooling]() if pooling else matrix
    return value / np.linalg.norm(value, axis=-1, keepdims=True) if normalize else value


def long_whisper(pipe: Any, call: Call) -> Any:
    """Recordings above 30 s need timestamps inside; without a parameter the text must be that of `return_timestamps=True`."""
    if len(call.inputs) > pipe.feature_extractor.n_samples and not call.parameters.get("return_timestamps"):
        return {"text": direct(pipe, Call(call.inputs, {**call.parameters, "return_timestamps": True}))["text"]}
    return direct(pipe, call)


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


def recordings(seconds: Sequence[float], _: Path) -> list[Any]:
    kinds = ("speech", "chirp", "noise", "speech")
    return [audio(length, kinds[index % 4], seed=index) for index, length in enumerate(seconds)]


_WRITING = "text-generation"
_BEAMS = {"do_sample": False, "num_beams": 3, "max_new_tokens": 7}
_SPEECH = "automatic-speech-recognition"
_WHISPER = f"{_SPEECH}:whisper"
_GREEDY = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 12}}

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
    Case(_WHISPER),
    Case(
        _WHISPER,
        [_GREEDY, {**_GREEDY, "return_timestamps": True}, {**_GREEDY, "return_timestamps": "word"}],
        "timestamps",
        expected=long_whisper,
    ),
    Case(
        _WHISPER,
        [
            {**_GREEDY, "chunk_length_s": 10.0},
            {**_GREEDY, "chunk_length_s": 12.0, "stride_length_s": [4.0, 2.0], "return_timestamps": True},
            {**_GREEDY, "chunk_length_s": 30.0, "return_timestamps": "word"},
        ],
        "chunked",
        partial(recordings, (31.0, 2.0, 45.5, 11.0)),
    ),
    Case(
        _WHISPER,
        [_GREEDY, {**_GREEDY, "return_timestamps": True}, {**_GREEDY, "return_timestamps": "word"}],
        "long",
        partial(recordings, (33.0, 3.0, 41.5, 1.2, 41.5, 33.0)),
        expected=long_whisper,
    ),
    Case(
        _WHISPER,
        [{**_GREEDY, "return_language": True, "return_timestamps": True}, _GREEDY],
        "language",
        partial(recordings, (3.0, 1.2, 9.0, 5.0)),
    ),
    Case(_SPEECH),
    Case(_SPEECH, [{}], "whole", shares=1),
    Case(_SPEECH, [{"return_timestamps": "char"}, {"return_timestamps": "word"}], "timestamps", shares=1),
    Case(
        _SPEECH,
        [{"chunk_length_s": 2.0}, {"chunk_length_s": 1.5, "stride_length_s": 0.25, "return_timestamps": "char"}],
        "chunked",
        partial(recordings, (0.8, 7.3, 4.0, 2.0, 5.5)),
    ),
    Case(f"{_SPEECH}:ctc-masked"),
    Case(f"{_SPEECH}:ctc-masked", [{}], "whole", shares=1),
    Case(
        f"{_SPEECH}:ctc-masked",
        [{"chunk_length_s": 2.0}, {"chunk_length_s": 1.5, "stride_length_s": [0.5, 0.1]}],
        "chunked",
        partial(recordings, (0.8, 7.3, 4.0, 2.0, 5.5)),
    ),
    Case("image-classification", [{}, {"top_k": 1}, {"top_k": 2, "function_to_apply": "sigmoid"}], shares=4),
    Case("image-classification:convbn", [{}, {"function_to_apply": "none"}], shares=4),
)
