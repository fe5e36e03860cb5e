"""Tasks whose input or result is sound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.checkpoints.media import audio
from tests.parity.cases.case import Case, direct
from tests.parity.harness import Call


def long_whisper(pipe: Any, call: Call) -> Any:
    """Recordings above 30 s need timestamps inside; without a parameter the text must be that of `return_timestamps=True`."""
    if len(call.inputs) > pipe.feature_extractor.n_samples and not call.parameters.get("return_timestamps"):
        return {"text": direct(pipe, Call(call.inputs, {**call.parameters, "return_timestamps": True}))["text"]}
    return direct(pipe, call)


def recordings(seconds: Sequence[float], _: Path) -> list[Any]:
    kinds = ("speech", "chirp", "noise", "speech")
    return [audio(length, kinds[index % 4], seed=index) for index, length in enumerate(seconds)]


_SPEECH = "automatic-speech-recognition"
_WHISPER = f"{_SPEECH}:whisper"
_GREEDY = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 12}}

CASES = (
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
)
