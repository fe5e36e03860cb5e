"""Tasks whose input or result is sound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipefleet_workers.adapters.audio.zero_shot import content_seed
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


def seeded(pipe: Any, call: Call) -> Any:
    """transformers has no parameter for it: the caller seeds torch before the call."""
    parameters = dict(call.parameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parameters.pop("seed"))
        return direct(pipe, Call(call.inputs, parameters))


def sung(pipe: Any, call: Call) -> Any:
    """transformers takes arguments of generate() inside `generate_kwargs` alone."""
    parameters = dict(call.parameters)
    outer = {"seed": parameters.pop("seed")}
    nested = {**parameters.pop("generate_kwargs", {}), **parameters}
    return seeded(pipe, Call(call.inputs, {**outer, "generate_kwargs": nested}))


def cropped_by_content(pipe: Any, call: Call) -> Any:
    """CLAP chooses ten seconds of a longer recording with numpy's global numbers, which the caller seeds before the call."""
    state = np.random.get_state()
    np.random.seed(content_seed(call.inputs))
    try:
        return direct(pipe, call)
    finally:
        np.random.set_state(state)


def sounds(seconds: Sequence[float], _: Path) -> list[Any]:
    """Recordings at CLAP's 48 kHz."""
    kinds = ("chirp", "noise", "speech", "sine")
    return [audio(length, kinds[index % 4], 48_000, seed=index) for index, length in enumerate(seconds)]


def sentences(_: Path) -> list[Any]:
    return ["Good evening.", "yes", "The night train to the coast leaves at nine.", "No, not at all!"]


_SPEECH = "automatic-speech-recognition"
_CLASSIFY = "audio-classification"
_ZERO_SHOT = "zero-shot-audio-classification"
_SPEAK = "text-to-audio"
_WHISPER = f"{_SPEECH}:whisper"
_GREEDY = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 12}}
_UNSURE = {
    "num_beams": 1,
    "max_new_tokens": 8,
    "temperature": [0.0, 0.4, 1.0],
    "logprob_threshold": -4.0,
    "compression_ratio_threshold": 1.6,
    "no_speech_threshold": 0.01,
}
"""Where some recordings are decoded again."""

_WORDS = {"num_beams": 2, "max_new_tokens": 10}


def as_given(pipe: Any, call: Call) -> Any:
    """With `prompt_ids` as the tensor and `temperature` as the tuple that transformers takes, and torch seeded before the call."""
    parameters = {"seed": 0, **call.parameters}
    if "prompt_ids" in parameters:
        parameters["prompt_ids"] = torch.tensor(parameters["prompt_ids"])
    if isinstance(parameters.get("temperature"), list):
        parameters["temperature"] = tuple(parameters["temperature"])
    return seeded(pipe, Call(call.inputs, parameters))


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
        shares=4,
    ),
    Case(
        _WHISPER,
        [{**_GREEDY, "return_language": True, "chunk_length_s": 5.0}],
        "language-of-chunks",
        partial(recordings, (3.0, 13.0, 9.0)),
        shares=6,
    ),
    Case(
        _WHISPER,
        [
            {"generate_kwargs": {"num_beams": beams, "max_new_tokens": 12}, "return_timestamps": "word"}
            for beams in (2, 3)
        ],
        "words-of-beams",
        partial(recordings, (3.0, 1.2, 9.0, 5.0)),
        shares=4,
    ),
    Case(
        _WHISPER,
        [
            {"seed": 5, "generate_kwargs": _UNSURE, "return_timestamps": True},
            {"seed": 6, "generate_kwargs": _UNSURE, "return_timestamps": "word"},
            {"seed": 7, "generate_kwargs": _UNSURE},
        ],
        "fallback",
        partial(recordings, (3.0, 1.2, 2.0)),
        seeded,
        shares=3,
    ),
    Case(
        _WHISPER,
        [{"seed": 5, "generate_kwargs": {"num_beams": 1, "max_new_tokens": 9, "temperature": 0.8}}],
        "sampled",
        partial(recordings, (3.0, 1.2, 9.0)),
        seeded,
        shares=3,
    ),
    Case(
        _WHISPER,
        [
            {
                "generate_kwargs": {**_GREEDY["generate_kwargs"], "condition_on_prev_tokens": True},
                "return_timestamps": "word",
            }
        ],
        "conditioned",
        partial(recordings, (33.0, 1.2, 33.0)),
        shares=1,
    ),
    Case(
        _WHISPER,
        [
            _WORDS,
            {**_WORDS, "generate_kwargs": {"num_beams": 4, "task": "translate"}, "language": "de"},
            {"max_new_tokens": 10, "prompt_ids": [50, 60, 70]},
            {"max_new_tokens": 10, "do_sample": True, "temperature": 0.7, "top_k": 9, "seed": 4},
            {
                "max_new_tokens": 10,
                "temperature": [0.0, 0.6],
                "logprob_threshold": -0.1,
                "seed": 5,
                "return_timestamps": True,
                "compression_ratio_threshold": 1.35,
            },
            {"max_new_tokens": None, "num_beams": 1, "suppress_tokens": [5, 6], "repetition_penalty": 2.0},
        ],
        "keywords",
        partial(recordings, (1.2, 3.0, 9.0)),
        expected=as_given,
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
    Case(f"{_SPEECH}:ctc-masked", ragged=True),
    Case(
        f"{_SPEECH}:ctc-masked",
        [{}, {"return_timestamps": "char"}, {"return_timestamps": "word"}],
        "whole",
        partial(recordings, (0.8, 7.3, 4.01, 2.0, 5.5003, 0.31)),
        shares=12,
        ragged=True,
    ),
    Case(
        f"{_SPEECH}:ctc-masked",
        [
            {"chunk_length_s": 2.0},
            {"chunk_length_s": 1.5, "stride_length_s": [0.5, 0.1]},
            {"chunk_length_s": 1.1, "stride_length_s": [0.2, 0.0], "return_timestamps": "char"},
            {"chunk_length_s": 2.0, "stride_length_s": 0.3, "return_timestamps": "word"},
        ],
        "chunked",
        partial(recordings, (0.8, 7.3, 4.0, 2.0, 5.5)),
        shares=24,
        ragged=True,
    ),
    Case(_CLASSIFY, shares=1),
    Case(
        _CLASSIFY,
        [{}, {"top_k": 2}, {"top_k": 1, "function_to_apply": "sigmoid"}, {"top_k": None, "function_to_apply": "none"}],
        "parameters",
        partial(recordings, (1.0, 2.5, 1.0)),
        shares=8,
    ),
    Case(f"{_CLASSIFY}:ast", shares=5),
    Case(_ZERO_SHOT, expected=cropped_by_content, shares=4),
    Case(
        _ZERO_SHOT,
        [
            {"candidate_labels": ["rain", "a dog barking"]},
            {"candidate_labels": ["a dog barking", "music", "rain", "a very long description of wind in the trees"]},
            {"candidate_labels": ["rain"], "hypothesis_template": "one hears {}"},
            {"candidate_labels": ["music", "rain", "music"], "hypothesis_template": "{}"},
        ],
        "labels",
        partial(sounds, (0.4, 3.0, 9.9)),
        shares=12,
    ),
    Case(
        _ZERO_SHOT,
        [{"candidate_labels": ["a person speaking", "rain"]}, {"candidate_labels": ["wind", "rain", "birds"]}],
        "longer-than-ten-seconds",
        partial(sounds, (12.0, 10.0, 31.5)),
        cropped_by_content,
        shares=4,
    ),
    Case(_SPEAK, [{"seed": 7}], "seeded", expected=seeded, shares=1),
    Case(
        _SPEAK,
        [{"seed": 3, "forward_params": {"speaking_rate": 0.5}}, {"seed": 4}, {"seed": 5}],
        "parameters",
        sentences,
        seeded,
        shares=1,
    ),
    Case(f"{_SPEAK}:musicgen", shares=3),
    Case(
        f"{_SPEAK}:musicgen",
        [
            {"seed": 1, "generate_kwargs": {"max_new_tokens": 9}},
            {"seed": 2, "generate_kwargs": {"max_new_tokens": 9}},
            {"seed": 2, "generate_kwargs": {"max_new_tokens": 14, "temperature": 0.7, "top_k": 5}},
            {"seed": 2, "generate_kwargs": {"max_new_tokens": 9, "guidance_scale": 1.0}},
            {"seed": 3, "forward_params": {"max_new_tokens": 9}},
        ],
        "sampled",
        sentences,
        seeded,
        shares=8,
    ),
    Case(
        f"{_SPEAK}:musicgen",
        [
            {"seed": 1, "max_new_tokens": 9, "num_return_sequences": 2},
            {"seed": 2, "max_new_tokens": 9, "num_return_sequences": 2},
            {"seed": 3, "max_new_tokens": 9, "do_sample": False},
            {"seed": 4, "generate_kwargs": {"max_new_tokens": 30}, "max_new_tokens": 9},
        ],
        "keywords",
        sentences,
        sung,
        shares=4,
    ),
)
