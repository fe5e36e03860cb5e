"""Boxes and run-length masks for mask-generation, in NumPy. Only `masks` calls these functions; they raise nothing of their own.

They take the place of torchvision's functions, since not every machine can import torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def non_maximum_suppression(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], *, iou_threshold: float
) -> NDArray[np.int64]:
    """Indices of the kept boxes, best score first. A box is dropped if it overlaps a better kept box by more than the threshold.

    `boxes` is `[n, 4]` as x0, y0, x1, y1; equal scores stay in order. Overlap is intersection over union. Two boxes without an area
    have no overlap, so both are kept, as in torchvision.
    """
    order = np.argsort(-scores, kind="stable")
    threshold = np.float64(iou_threshold)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    while order.size:
        best, order = order[0], order[1:]
        kept.append(int(best))
        order = order[~(_overlap(boxes, areas, best, order) > threshold)]
    return np.asarray(kept, np.int64)


def mask_of(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The mask `[height, width]` of run lengths. The runs go down the columns; the first run lies outside the mask."""
    height, width = rle["size"]
    counts = np.asarray(rle["counts"])
    inside = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, counts).reshape(width, height).T)


def _overlap(
    boxes: NDArray[np.float32], areas: NDArray[np.float32], one: np.int64, others: NDArray[np.int64]
) -> NDArray[np.float32]:
    low = np.maximum(boxes[one, :2], boxes[others, :2])
    high = np.minimum(boxes[one, 2:], boxes[others, 2:])
    width, height = np.clip(high - low, 0, None).T
    shared = width * height
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float32] = shared / (areas[one] + areas[others] - shared)
    return found
