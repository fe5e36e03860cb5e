"""Turns the CTranslate2 weights of an English-only Whisper into a Hugging Face folder. `weights` calls it.

In: a folder with `model.bin`, `config.json` and `tokenizer.json`, as faster-whisper's models have. Out: a folder that
`transformers.pipeline("automatic-speech-recognition", model=folder)` loads. A foreign model raises ModelFileError.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

from pipefleet_workers.fleet.demo.ctranslate2 import Array, ModelFileError, read_model

# The English-only vocabulary: text, end, start, 99 languages, five control tokens, then 1501 timestamps.
VOCABULARY = 51864
END, START, PREVIOUS, NO_TIMESTAMPS = 50256, 50257, 50360, 50362
_END_TEXT = "<|endoftext|>"
_HEAD_DIM = 64

ALL = slice(None)


def convert(source: Path, target: Path) -> None:
    """Write the model of the folder `source` to the folder `target`, file by file; `target` may exist.

    Raises `ModelFileError` when `source` holds another architecture or another vocabulary, and `OSError`.
    """
    path = source / "model.bin"
    weights = read_model(path)
    if weights.spec != "WhisperSpec":
        raise ModelFileError(f"{path} holds a {weights.spec}; give a folder with a Whisper model.")
    try:
        config = _config(weights.tensors)
        state = _state(weights.tensors, config)
    except KeyError as error:
        raise ModelFileError(f"{path} lacks {error}; give an unmodified Whisper model.") from None
    target.mkdir(parents=True, exist_ok=True)
    # Not save_pretrained, since it draws a progress bar on the user's terminal and leaves a file only its owner
    # may read.
    (target / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config.save_pretrained(target)
    _generation_config(json.loads((source / "config.json").read_text())).save_pretrained(target)
    _processor(source).save_pretrained(target)


def _state(tensors: Mapping[str, Array], config: WhisperConfig) -> dict[str, torch.Tensor]:
    # Saved as float32 (151 MB) and not as the float16 of the source (76 MB): dtype="auto" follows the file,
    # loading takes the same 0.4 s, and on two CPU cores float16 transcribed 25 s of speech in 6.0 s, float32
    # in 3.7 s.
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in _renamed(tensors, config)}
    _check(state, config)
    return state


def _check(state: Mapping[str, torch.Tensor], config: WhisperConfig) -> None:
    """Refuse weights that from_pretrained would only warn about: it fills absent weights with random numbers."""
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    expected = {name: value.shape for name, value in model.state_dict().items() if name != "proj_out.weight"}
    if expected != {name: value.shape for name, value in state.items()}:
        raise ModelFileError("The weights are not those of a Whisper model; give an unmodified model.bin.")


def _config(tensors: Mapping[str, Array]) -> WhisperConfig:
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    mel_bins = tensors["encoder/conv1/weight"].shape[1]
    if vocabulary != VOCABULARY:
        raise ModelFileError(
            f"The model has {vocabulary} tokens where English-only Whisper has {VOCABULARY}; "
            "give one whose name ends in .en."
        )
    heads, hidden = width // _HEAD_DIM, tensors["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    return WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float32",
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=mel_bins,
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        max_source_positions=tensors["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=tensors["decoder/position_encodings/encodings"].shape[0],
        pad_token_id=END,
        bos_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=START,
    )


def _layers(tensors: Mapping[str, Array], side: str) -> int:
    start, end = f"{side}/layer_", "/ffn/linear_0/weight"
    return sum(name.startswith(start) and name.endswith(end) for name in tensors)


def _generation_config(meta: Mapping[str, Any]) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        max_length=448,
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMESTAMPS,
        prev_sot_token_id=PREVIOUS,
        max_initial_timestamp_index=50,
        suppress_tokens=meta["suppress_ids"],
        begin_suppress_tokens=meta["suppress_ids_begin"],
        alignment_heads=meta["alignment_heads"],
        return_timestamps=False,
    )


def _processor(source: Path) -> WhisperProcessor:
    tokenizer = WhisperTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        unk_token=_END_TEXT,
        bos_token=_END_TEXT,
        eos_token=_END_TEXT,
        pad_token=_END_TEXT,
        model_max_length=1024,
    )
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=80), tokenizer)


def _renamed(tensors: Mapping[str, Array], config: WhisperConfig) -> Iterator[tuple[str, Array]]:
    """Every weight of the Hugging Face model except the tied output projection, under its name there."""
    for conv in ("conv1", "conv2"):
        yield from _linear(tensors, f"encoder/{conv}", f"model.encoder.{conv}")
    yield "model.decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"]
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        yield f"model.{side}.embed_positions.weight", tensors[f"{side}/position_encodings/encodings"]
        yield from _norm(tensors, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(layers):
            old, new = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            yield from _self_attention(tensors, old, new)
            yield from _feed_forward(tensors, old, new)
            if side == "decoder":
                yield from _cross_attention(tensors, old, new)


def _self_attention(tensors: Mapping[str, Array], old: str, new: str) -> Iterator[tuple[str, Array]]:
    # linear_0 stacks the query, key and value rows; Whisper's key projection has no bias (zeros here).
    fused = f"{old}/self_attention/linear_0"
    query, key, value = _parts(tensors, fused, 3)
    yield from _norm(tensors, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
    yield from _linear(tensors, fused, f"{new}.self_attn.q_proj", rows=query)
    yield f"{new}.self_attn.k_proj.weight", tensors[f"{fused}/weight"][key]
    yield from _linear(tensors, fused, f"{new}.self_attn.v_proj", rows=value)
    yield from _linear(tensors, f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")


def _cross_attention(tensors: Mapping[str, Array], old: str, new: str) -> Iterator[tuple[str, Array]]:
    fused = f"{old}/attention/linear_1"
    key, value = _parts(tensors, fused, 2)
    yield from _norm(tensors, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
    yield from _linear(tensors, f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
    yield f"{new}.encoder_attn.k_proj.weight", tensors[f"{fused}/weight"][key]
    yield from _linear(tensors, fused, f"{new}.encoder_attn.v_proj", rows=value)
    yield from _linear(tensors, f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")


def _feed_forward(tensors: Mapping[str, Array], old: str, new: str) -> Iterator[tuple[str, Array]]:
    yield from _norm(tensors, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    yield from _linear(tensors, f"{old}/ffn/linear_0", f"{new}.fc1")
    yield from _linear(tensors, f"{old}/ffn/linear_1", f"{new}.fc2")


def _parts(tensors: Mapping[str, Array], fused: str, count: int) -> list[slice]:
    rows = tensors[f"{fused}/weight"].shape[0] // count
    return [slice(part * rows, (part + 1) * rows) for part in range(count)]


def _norm(tensors: Mapping[str, Array], old: str, new: str) -> Iterator[tuple[str, Array]]:
    yield f"{new}.weight", tensors[f"{old}/gamma"]
    yield f"{new}.bias", tensors[f"{old}/beta"]


def _linear(tensors: Mapping[str, Array], old: str, new: str, *, rows: slice = ALL) -> Iterator[tuple[str, Array]]:
    yield f"{new}.weight", tensors[f"{old}/weight"][rows]
    yield f"{new}.bias", tensors[f"{old}/bias"][rows]
