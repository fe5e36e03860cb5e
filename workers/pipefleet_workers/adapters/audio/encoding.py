"""Whisper's encoder on a CPU: the recordings of a batch go through it one by one, and their states come back as one tensor.

One recording of 1,500 positions already keeps a core busy, and its states fit the cache. The states of several do not fit: a batch
of 8 takes 16 % more CPU time for each recording, a batch of 16 takes 25 % more. The decoder still runs over the whole batch. On a
GPU nothing changes. `SpeechRecogniser` calls `encode_one_by_one` once for each model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def encode_one_by_one(model: Any) -> None:
    """Let the encoder of this one `model` object run row by row, if the model is on a CPU."""
    if model.device.type != "cpu":
        return
    encoder = model.get_encoder()
    together = encoder.forward

    @functools.wraps(together)  # generate() reads the names of the arguments
    def forward(input_features: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        first, *others = (together(row, *arguments, **named) for row in torch.split(input_features, 1))
        for name in [*first] if others else ():
            first[name] = _joined([first[name], *(one[name] for one in others)])
        return first

    encoder.forward = forward


def _joined(values: list[Any]) -> Any:
    """One value of all rows: tensors are joined along the rows, tuples layer by layer."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return tuple(_joined(list(layer)) for layer in zip(*values, strict=True))
