"""Tasks whose input is pictures or video alone."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers.utils.import_utils import BACKENDS_MAPPING

from tests.checkpoints import inputs
from tests.checkpoints.media import image
from tests.parity.cases.case import Case, direct
from tests.parity.harness import Call


def brute_force_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Every pair looked at, in plain numbers: what torchvision's operator is documented to return."""
    found: list[int] = []
    for one in sorted(range(len(boxes)), key=lambda index: -float(scores[index])):
        if all(overlap(boxes[one].tolist(), boxes[other].tolist()) <= iou_threshold for other in found):
            found.append(one)
    return torch.tensor(found, dtype=torch.int64)


def overlap(one: list[float], other: list[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union else 0.0


@contextlib.contextmanager
def stand_in_for_torchvision() -> Iterator[None]:
    """The one function that mask-generation imports from torchvision."""
    stand_in = types.ModuleType("torchvision.ops.boxes")

    def batched_nms(*, boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> torch.Tensor:
        return brute_force_nms(boxes, scores, iou_threshold)

    stand_in.batched_nms = batched_nms  # type: ignore[attr-defined]
    names = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    present = mock.patch.dict(BACKENDS_MAPPING, {"torchvision": (lambda: True, "")})
    with present, mock.patch.dict(sys.modules, {**names, "torchvision.ops.boxes": stand_in}):
        yield


def masks(pipe: Any, call: Call) -> Any:
    with stand_in_for_torchvision():
        return direct(pipe, call)


def files(folder: Path) -> list[Any]:
    return [Path(name) for name in inputs.videos(folder)]


def watched(pipe: Any, call: Call) -> Any:
    return direct(pipe, Call(str(call.inputs), call.parameters))


def same_size(_: Path) -> list[Any]:
    """Pictures of one size next to others: only equal shapes may meet."""
    return [image(64, 48), image(64, 48, 1), image(80, 56, 2), image(64, 48, 3), image(80, 56, 1)]


def pairs_of_one_size(_: Path) -> list[Any]:
    first, second, flat = image(80, 60), image(120, 90, 2), image(80, 60, 1).resize((8, 6)).resize((80, 60))
    return [[first, first.rotate(5)], [first, second], [flat, second], [second, flat]]


def grown(pipe: Any, call: Call) -> Any:
    """By hand: what the model makes of the picture, as bytes."""
    pixels = pipe.image_processor(images=[call.inputs], return_tensors="pt")
    with torch.no_grad():
        (made,) = pipe.model(**pixels).reconstruction
    return (255 * made.permute(1, 2, 0).numpy().clip(0, 1)).round().astype("uint8")


_SEGMENTS = {"threshold": 0.3}
_MASKS = {
    "points_per_crop": 4,
    "points_per_batch": 6,
    "pred_iou_thresh": -10.0,
    "stability_score_thresh": -1.0,
    "mask_threshold": 0.03,  # here a random model's masks are of all sizes, and suppression takes about half of them
}

CASES = (
    Case("image-classification", [{}, {"top_k": 1}, {"top_k": 2, "function_to_apply": "sigmoid"}], shares=4),
    Case("image-classification:convbn", [{}, {"function_to_apply": "none"}], shares=4),
    Case("depth-estimation", shares=4),
    Case("depth-estimation:dynamic", inputs=same_size, shares=3),
    Case(
        "image-feature-extraction",
        [{}, {"pool": True}, {"image_processor_kwargs": {"do_normalize": False}}],
        shares=8,
    ),
    Case("image-segmentation", [{}, {"subtask": "semantic"}], shares=4),
    Case(
        "image-segmentation:panoptic",
        [
            _SEGMENTS,
            {**_SEGMENTS, "subtask": "instance"},
            {**_SEGMENTS, "subtask": "semantic"},
            {"threshold": 0.2, "mask_threshold": 0.6, "overlap_mask_area_threshold": 0.1},
        ],
        inputs=same_size,
        shares=8,
    ),
    Case("image-to-image", inputs=same_size, shares=3, expected=grown),
    Case("image-to-image", name="sizes", shares=1),
    Case("keypoint-matching", [{}, {"threshold": 0.2}], inputs=pairs_of_one_size, shares=8),
    Case("keypoint-matching", name="sizes"),
    Case("mask-generation", expected=masks, shares=6),
    Case(
        "mask-generation",
        [
            {**_MASKS, "output_rle_mask": True, "output_bboxes_mask": True},
            {**_MASKS, "points_per_batch": None, "crops_nms_thresh": 0.2},
            {**_MASKS, "pred_iou_thresh": 0.1, "mask_threshold": 0.05},
            {**_MASKS, "stability_score_thresh": 0.4, "stability_score_offset": 0.01, "mask_threshold": 0.0},
            {**_MASKS, "crops_n_layers": 1, "crop_overlap_ratio": 0.2, "points_per_batch": 8},
            {**_MASKS, "pred_iou_thresh": 1000.0},
        ],
        "parameters",
        expected=masks,
        shares=4,
    ),
    Case("object-detection", [{}, {"threshold": 0.2}], inputs=same_size, shares=4),
    Case("object-detection", name="sizes"),
    Case("object-detection:fixed", [{}, {"threshold": 0.1}], shares=8),
    Case(
        "video-classification",
        [{}, {"top_k": 2}, {"frame_sampling_rate": 1, "function_to_apply": "sigmoid"}, {"function_to_apply": "none"}],
        inputs=files,
        expected=watched,
        shares=8,
    ),
)
