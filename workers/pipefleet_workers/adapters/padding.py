"""Stacks tensors of unequal sizes, filled up to the largest. Only adapters whose models hide padding (with a mask) call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def pad(tensors: Sequence[torch.Tensor], value: float) -> torch.Tensor:
    """Tensors `[1, …]` of one number of dimensions, stacked. Each is filled up with `value` behind its end, in every dimension."""
    shapes = [tensor.shape[1:] for tensor in tensors]
    if all(shape == shapes[0] for shape in shapes):
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    stacked = tensors[0].new_full((len(tensors), *largest), value)
    for row, tensor, shape in zip(stacked, tensors, shapes, strict=True):
        row[tuple(slice(size) for size in shape)] = tensor[0]
    return stacked


def pad_features(rows: Sequence[Mapping[str, Any]], value: float) -> dict[str, Any]:
    """The tensors of all rows by name, stacked with `pad`: with 0 in the attention mask, with `value` elsewhere."""
    return {name: pad([row[name] for row in rows], 0 if name == "attention_mask" else value) for name in rows[0]}
