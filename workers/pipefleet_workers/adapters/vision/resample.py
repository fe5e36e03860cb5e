"""Pillow's resizing of pictures as two products of matrices, for a device. It gives exactly Pillow's levels. `on_device` calls it.

Pillow weighs pixels with whole numbers of 22 bits and rounds to 8 bits between its two passes. `torch.nn.functional.interpolate`
does neither. Its antialiased bilinear differs by one level in a fifth of the pixels of noise; its bicubic differs by more than
twenty levels where the first pass overshoots. Here each weight is split in two parts, so that every sum stays below 2^24 and is
exact in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

_BITS = 22
_LOW_BITS = 7
MOST_TAPS = 500
"""The most pixels that contribute to one resized pixel.

With more, the sum of the lower parts of the weights is too large to be exact in float32.
"""
_PROBED = 8
Array = np.ndarray[Any, Any]


def _triangle(
    x: Array,
) -> Array:
    return np.maximum(0.0, 1.0 - x)


def _cubic(x: Array) -> Array:
    inner, outer = (1.5 * x - 2.5) * x * x + 1.0, (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, inner, np.where(x < 2.0, outer, 0.0))


def _lanczos(x: Array) -> Array:
    return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


_FILTERS: dict[int, tuple[float, Callable[..., Array]]] = {
    int(Image.Resampling.BILINEAR): (1.0, _triangle),
    int(Image.Resampling.BICUBIC): (2.0, _cubic),
    int(Image.Resampling.LANCZOS): (3.0, _lanczos),
}
"""Reach and shape of each filter, by its number in Pillow."""
FILTERS = frozenset(_FILTERS)


@functools.lru_cache(maxsize=64)
def weights(before: int, after: int, resample: int) -> Array:
    """The share of each of `before` pixels in each of `after` pixels, in units of 2^-22: `[before, after]`."""
    reach, shape = _FILTERS[resample]
    scale = before / after
    stretch = max(1.0, scale)
    centres = (np.arange(after) + 0.5) * scale
    first = np.maximum(0, (centres - reach * stretch + 0.5).astype(np.int64))
    last = np.minimum(before, (centres + reach * stretch + 0.5).astype(np.int64))
    places = np.arange(before)[:, None]
    shares: Array = shape(np.abs((places - centres + 0.5) / stretch))
    shares = np.where((places >= first) & (places < last), shares, 0.0)
    shares /= shares.sum(0)
    whole: Array = np.trunc(shares * (1 << _BITS) + np.where(shares < 0, -0.5, 0.5)).astype(np.int64)
    return whole


@functools.lru_cache(maxsize=4096)
def vertical_first(before: tuple[int, int], after: tuple[int, int], resample: int) -> bool | None:
    """Whether Pillow resizes columns before rows, for sizes as (height, width). None if neither order gives Pillow's result here.

    Pillow itself is asked, with noise of that size: from version 13 on it takes the cheaper order, by a rule of its own.
    """
    (height, width), (rows, columns) = before, after
    ratio = max(height / rows, width / columns)
    if resample not in FILTERS or 2 * _FILTERS[resample][0] * max(1.0, ratio) + 1 > MOST_TAPS:
        return None
    noise = np.random.default_rng(height * width).integers(0, 256, before, dtype=np.uint8)
    resized = np.asarray(Image.fromarray(noise).resize((columns, rows), Image.Resampling(resample)))
    down = np.linspace(0, rows - 1, _PROBED).astype(np.int64)
    across = np.linspace(0, columns - 1, _PROBED).astype(np.int64)
    wanted = resized[np.ix_(down, across)]
    by_row, by_column = weights(height, rows, resample)[:, down], weights(width, columns, resample)[:, across]
    tall, wide = np.flatnonzero(by_row.any(1)), np.flatnonzero(by_column.any(1))
    pixels, by_row, by_column = noise[np.ix_(tall, wide)].astype(np.int64), by_row[tall], by_column[wide]
    if np.array_equal(_rounded(by_row.T @ _rounded(pixels @ by_column)), wanted):
        return False
    return True if np.array_equal(_rounded(_rounded(by_row.T @ pixels) @ by_column), wanted) else None


def _rounded(sums: Array) -> Array:
    return ((sums + (1 << (_BITS - 1))) >> _BITS).clip(0, 255)


def resize(pictures: torch.Tensor, after: tuple[int, int], resample: int, *, columns_first: bool) -> torch.Tensor:
    """Resize pictures `[…, height, width]` to `after`. Input and output are whole numbers in float32.

    `columns_first` is the result of `vertical_first`. Needs float32 products in full precision, as is torch's default.
    """
    if columns_first:
        return _rows(_columns(pictures, after[0], resample), after[1], resample)
    return _columns(_rows(pictures, after[1], resample), after[0], resample)


def _columns(pictures: torch.Tensor, after: int, resample: int) -> torch.Tensor:
    return _rows(pictures.transpose(-1, -2), after, resample).transpose(-1, -2)


def _rows(pictures: torch.Tensor, after: int, resample: int) -> torch.Tensor:
    before = pictures.shape[-1]
    if before == after:
        return pictures
    sums = pictures @ _parts(before, after, resample, pictures.device)
    high, low = sums[..., :after].to(torch.int32), sums[..., after:].to(torch.int32)
    levels = ((high << _LOW_BITS) + low + (1 << (_BITS - 1))) >> _BITS
    return levels.clamp_(0, 255).to(torch.float32)


@functools.lru_cache(maxsize=64)
def _parts(before: int, after: int, resample: int, device: torch.device) -> torch.Tensor:
    """The high and the low parts of the weights, side by side: `[before, 2 * after]`."""
    whole = weights(before, after, resample)
    parts = np.concatenate([whole >> _LOW_BITS, whole & ((1 << _LOW_BITS) - 1)], axis=1)
    there = torch.from_numpy(parts.astype(np.float32)).to(device)
    if device.type == "cuda":  # the next reader may work on another stream
        torch.cuda.current_stream(device).synchronize()
    return there
