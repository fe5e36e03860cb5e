"""Estimates the bytes that a value takes in memory: it counts arrays, tensors, pictures and long lists.

`bytes_of` feeds the engine's budget and the weight of a message; `text_bytes` bounds the texts of inputs and parameters.
No errors: an unknown value counts as one number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipefleet.contract.references import MAX_DEPTH

NUMBER = 32
"""Bytes of a number in a list: the object and its pointer."""
MODES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 2, "RGB": 4}
"""Bytes of a pixel in Pillow's memory; 4 in all other modes."""
DEPTH = 16
_NUMBERS, _TEXTS, _LISTS = (
    (int, float),
    (str, bytes),
    (list, tuple),
)  # tuples, since a union would be built at every call


def bytes_of(value: Any, depth: int = DEPTH) -> int:
    """Bytes of `value`. The first number of a list stands for all; values deeper than `depth` levels are left out."""
    if isinstance(value, _LISTS):  # first, as the most frequent; a tensor is told slowly
        if value and isinstance(value[0], _NUMBERS):
            return NUMBER * len(value)
        return sum([bytes_of(one, depth - 1) for one in value]) if depth else 0
    if isinstance(value, _NUMBERS):
        return NUMBER
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, _TEXTS):
        return len(value)
    if isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101 - a dict is told far faster
        return sum([bytes_of(one, depth - 1) for one in value.values()]) if depth else 0
    if isinstance(value, torch.Tensor):
        return value.nelement() * value.element_size()
    if isinstance(value, Image.Image):
        return value.width * value.height * MODES.get(value.mode, 4)
    raw = getattr(value, "raw", None)  # a picture that will be resized on the device
    return NUMBER if raw is None else bytes_of(raw, depth - 1)


def text_bytes(value: Any, bound: int, depth: int = MAX_DEPTH) -> int:
    """Bytes as UTF-8 of all texts and keys inside a JSON value; counting stops above `bound`."""
    if isinstance(value, str):
        return len(value) if len(value) > bound or value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        parts: Iterable[Any] = itertools.chain(value, value.values())
    elif isinstance(value, _LISTS):
        parts = value
    else:
        return 0
    total = 0
    for one in parts if depth else ():
        total += text_bytes(one, bound, depth - 1)
        if total > bound:
            break
    return total
