"""Real weights, where packages ship them: what trained attention makes of neighbours, random weights do not show.

Every result of a batch must be the one of its input alone, in every field.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from pipefleet_workers.adapters.audio.speech import SpeechRecogniser
from pipefleet_workers.adapters.text.encoder import FeatureExtractor
from pipefleet_workers.fleet.demo import weights
from pipefleet_workers.fleet.demo.assets import recordings
from tests.parity.harness import Call, assert_same, recording, running

SPEECH = "automatic-speech-recognition"
WORDS = {"return_timestamps": "word", "generate_kwargs": {"num_beams": 1}}
UNSURE = {
    "num_beams": 1,
    "temperature": (0.0, 0.4),
    "logprob_threshold": -0.4,
    "compression_ratio_threshold": 1.35,
    "no_speech_threshold": 0.6,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights.whisper_tiny_en(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """The pipeline itself."""
    return loaded(SPEECH, folder)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Any:
    return recording(SpeechRecogniser, loaded(SPEECH, folder))


@pytest.fixture(scope="module")
def heard() -> dict[str, np.ndarray[Any, Any]]:
    """Recordings of 2 to 4 s by name, and one in which nobody speaks."""
    names = {path.stem: path for path in recordings() if path.suffix in (".wav", ".flac")}
    found = {name: soundfile.read(path, dtype="float32")[0] for name, path in names.items()}
    return {**found, "silence": (1e-4 * np.random.default_rng(0).standard_normal(32_000)).astype(np.float32)}


def loaded(task: str, model: Path) -> Any:
    torch.set_num_threads(1)
    pipe = transformers.pipeline(task, model=str(model), device="cpu", dtype=torch.float32)
    pipe.model.eval()
    return pipe


def together(adapter: Any, task: str, calls: Sequence[Call]) -> list[Any]:
    adapter.batches.clear()
    with running(adapter, task) as engine:
        outcomes = engine.run_together(calls)
    assert [outcome.failure for outcome in outcomes] == [None] * len(calls)
    return [outcome.output for outcome in outcomes]


def called(pipe: Any, call: Call) -> Any:
    parameters = dict(copy.deepcopy(call.parameters))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parameters.pop("seed", 0))
        return pipe(call.inputs.copy(), **parameters)


def test_words_are_timed_as_in_each_recording_alone(adapter: Any, alone: Any, heard: dict[str, Any]) -> None:
    attention = adapter.pipe.model.config._attn_implementation
    calls = [Call(heard[name], WORDS) for name in ("pride-10", "carol-00", "walden-03")]
    results = together(adapter, SPEECH, calls)
    assert max(len(batch.units) for batch in adapter.batches) == len(calls)
    for result, call in zip(results, calls, strict=True):
        assert_same(result, called(alone, call))
    assert attention == adapter.pipe.model.config._attn_implementation != "eager", (
        "the next call begins as the first did"
    )


def test_words_of_chunks_and_beams_are_timed_as_in_each_chunk_alone(
    adapter: Any, alone: Any, heard: dict[str, Any]
) -> None:
    parameters = {"return_timestamps": "word", "generate_kwargs": {"num_beams": 2}, "chunk_length_s": 4.0}
    call = Call(np.concatenate([heard["alice-03"], heard["pride-10"]]), parameters)
    adapter.batches.clear()
    with running(adapter, SPEECH) as engine:
        (outcome,) = engine.run([call])
    assert [len(batch.units) for batch in adapter.batches] == [2]
    assert_same(outcome.output, called(alone, call))


def test_the_attention_of_timed_words_is_let_go_after_each_batch(adapter: Any, heard: dict[str, Any]) -> None:
    few = {**WORDS, "max_new_tokens": 3}
    together(adapter, SPEECH, [Call(heard[name], few) for name in ("pride-10", "carol-00")])
    adapter.batches.clear()
    gc.collect()
    positions = adapter.pipe.model.config.max_source_positions
    tensors = (one for one in gc.get_objects() if type(one) is torch.Tensor)
    assert [one.shape for one in tensors if one.dim() >= 3 and one.shape[-1] == positions] == [], "hundreds of MB"


def test_a_padding_token_that_is_text_is_not_read_as_text(adapter: Any, alone: Any, heard: dict[str, Any]) -> None:
    parameters = {"generate_kwargs": {"num_beams": 1, "max_new_tokens": 12, "pad_token_id": 5}}
    calls = [Call(heard[name], parameters) for name in ("pride-10", "carol-00")]
    for result, call in zip(together(adapter, SPEECH, calls), calls, strict=True):
        assert_same(result, called(alone, call))


def test_silence_and_decoding_again_leave_the_neighbours_alone(adapter: Any, alone: Any, heard: dict[str, Any]) -> None:
    parameters = {"seed": 11, "return_timestamps": "word", "generate_kwargs": UNSURE}
    calls = [Call(heard[name], parameters) for name in ("carol-00", "silence")]
    spoken, silent = together(adapter, SPEECH, calls)
    assert silent == {"text": "", "chunks": []}, "transformers fails here: it has no segment to join"
    assert_same(spoken, called(alone, calls[0]))


def test_vectors_of_sentences_do_not_depend_on_their_neighbours() -> None:
    folder = weights.minilm()
    alone, adapter = (
        loaded("feature-extraction", folder),
        recording(FeatureExtractor, loaded("feature-extraction", folder)),
    )
    texts = [
        "No.",
        "The night train to the coast leaves at nine.",
        "It was a bright cold day. " * 25,
        "Call me Ishmael.",
    ]
    results = together(adapter, "feature-extraction", [Call(text) for text in texts])
    assert max(len(batch.units) for batch in adapter.batches) == len(texts)
    for result, text in zip(results, texts, strict=True):
        assert_same(result, alone(text))
