"""What adapters of recordings share: padding with a mask, and the unit that their cost is counted in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipefleet_workers.arguments import STAGE
from pipefleet_workers.host_memory import available_bytes
from pipefleet_workers.items import ItemError

SAMPLES_PER_FRAME = 160
"""Samples counted as one frame, a hundredth of a second at 16 kHz: the cost unit of all models that hear."""


_ALWAYS_SECONDS = 30.0
"""Up to here nobody looks at the memory."""
_COPIES = 3
"""What the first convolution gives, normalised, and through its activation."""


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

    Above `most` seconds none is. On a CPU there must be memory for the first convolution too: a GPU that has none says so and
    goes on, a worker is killed.
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


def hears_padding(model: Any) -> bool:
    """Whether a model is known to normalise over time: then padding changes what it hears, mask or not."""
    return getattr(model.config, "feat_extract_norm", None) == "group"


def padded(rows: Sequence[Mapping[str, Any]], value: float) -> dict[str, Any]:
    """Tensors `[1, n, …]` of all rows, padded behind to the longest: with 0 in the attention mask, else with `value`."""
    return {name: _padded([row[name] for row in rows], 0 if name == "attention_mask" else value) for name in rows[0]}


def _padded(tensors: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    longest = max(tensor.shape[1] for tensor in tensors)
    if all(tensor.shape[1] == longest for tensor in tensors):
        return torch.cat(list(tensors))
    joined = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[2:]), value)
    for row, tensor in zip(joined, tensors, strict=True):
        row[: tensor.shape[1]] = tensor[0]
    return joined
