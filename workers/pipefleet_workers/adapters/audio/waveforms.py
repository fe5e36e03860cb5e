"""The bounds of a recording, and the unit of its cost. The adapters of recordings call these functions before the forward.

A recording that is too short, too long or cut into too many pieces raises ItemError (bad_input, too_long, bad_parameter).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.items import ItemError
from pipefleet_workers.process.memory import available_bytes

SAMPLES_PER_FRAME = 160
"""Samples that count as one frame, a hundredth of a second at 16 kHz. All models of recordings count their cost in such frames."""

MOST_PIECES = 50_000
"""Pieces of one recording."""
MOST_PIECE_BYTES = 9 << 28
"""Bytes of all pieces of one recording, which exist at once: six hours in pieces that overlap by a third take 2.1 GB."""
_ALWAYS_SECONDS = 30.0
"""Recordings up to this length are not checked against the memory."""
_COPIES = 3
"""Copies of the first convolution's output in memory: raw, normalised, and activated."""


def frames(features: torch.Tensor) -> int:
    """Length of a waveform `[1, samples]` or a spectrogram `[1, …]` in frames."""
    if features.ndim == 2:
        return max(1, features.shape[1] // SAMPLES_PER_FRAME)
    return max(features.shape[1:])


def require_frames(model: Any, features: Mapping[str, Any]) -> None:
    """Raise ItemError (bad_input) for a waveform that is too short for the convolutions of its model."""
    wave, kernels = features.get("input_values"), getattr(model.config, "conv_kernel", None)
    if wave is None or wave.ndim != 2 or not kernels:
        return
    samples = left = int(wave.shape[1])
    for kernel, stride in zip(kernels, model.config.conv_stride, strict=True):
        left = (left - kernel) // stride + 1
    if left < 1:
        raise ItemError("bad_input", f"the recording has {samples} samples, too few for this model", STAGE)


def require_piece(model: Any, seconds: float, rate: int, most: float, hint: str) -> None:
    """Raise ItemError (too_long) for a recording that a model cannot hear in one piece.

    No recording longer than `most` seconds is accepted. On a CPU there must also be memory for the first convolution: a GPU without
    memory raises an error and goes on, but a worker without memory is killed.
    """
    if seconds > most:
        text = f"the recording lasts {seconds:.0f} s, the model hears at most {most:.0f} s in one piece"
        raise ItemError("too_long", f"{text} (PIPEFLEET_WORKER_MAX_WHOLE_SECONDS); {hint}", STAGE)
    widths, strides = getattr(model.config, "conv_dim", None), getattr(model.config, "conv_stride", None)
    if model.device.type != "cpu" or not widths or not strides or seconds < _ALWAYS_SECONDS:
        return
    needed = int(seconds * rate / strides[0]) * widths[0] * _COPIES * 4
    room = available_bytes()
    if room is not None and needed > room:
        text = f"the recording lasts {seconds:.0f} s, for which the model needs {needed >> 20} MB in one piece"
        raise ItemError("too_long", f"{text} and {room >> 20} MB are free; {hint}", STAGE)


def require_few_pieces(samples: int, rate: int, align: int, asked: Mapping[str, Any], padded_bytes: int) -> None:
    """Raise ItemError (bad_parameter) if `chunk_length_s` and `stride_length_s` cut a recording into far too many pieces.

    Pieces that overlap almost wholly take thousands of times the memory of the recording. `padded_bytes` is the size of a piece
    that is filled up to a fixed length; 0 if pieces are not filled up.
    """
    seconds = asked.get("chunk_length_s")
    if not seconds:
        return
    stride = asked.get("stride_length_s")
    stride = seconds / 6 if stride is None else stride
    both = [stride, stride] if isinstance(stride, int | float) else stride
    chunk, left, right = (int(round(one * rate / align) * align) for one in (seconds, both[0], both[1]))
    step = chunk - left - right
    if step <= 0:
        raise ItemError("bad_parameter", "chunk_length_s is no longer than the strides at both its ends", STAGE)
    pieces = -(-samples // step)
    size = pieces * (padded_bytes or 4 * min(chunk, samples))
    if pieces > MOST_PIECES or size > MOST_PIECE_BYTES:
        text = f"the recording would be cut into {pieces} pieces of {size >> 20} MB together"
        hint = "pass a larger chunk_length_s or a smaller stride_length_s"
        bounds = f"{MOST_PIECES} pieces and {MOST_PIECE_BYTES >> 20} MB"
        raise ItemError("bad_parameter", f"{text}, above the bounds of {bounds}; {hint}", STAGE)


def hears_padding(model: Any) -> bool:
    """Whether a model is known to normalise over time. Padding then changes its result, with or without a mask."""
    return getattr(model.config, "feat_extract_norm", None) == "group"
