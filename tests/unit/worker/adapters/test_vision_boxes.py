"""Suppression of boxes against every pair looked at, and masks from run lengths against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.sam.image_processing_pil_sam import _mask_to_rle, _rle_to_mask

from pipefleet_workers.adapters.vision.boxes import mask_of, non_maximum_suppression
from tests.parity.cases.vision import brute_force_nms

_EDGE = st.integers(0, 12)


@st.composite
def scored_boxes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on a small grid, so that many overlap, touch, repeat or have no area; scores with ties."""
    corners = draw(st.lists(st.tuples(_EDGE, _EDGE, _EDGE, _EDGE), max_size=25))
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corners]
    scores = draw(st.lists(st.integers(0, 6), min_size=len(boxes), max_size=len(boxes)))
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32) / 6


@settings(max_examples=300, deadline=None)
@given(scored_boxes(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))  # the same number in 32 bits as in 64
def test_what_stays_is_what_a_look_at_every_pair_leaves(drawn: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    boxes, scores = drawn
    found = non_maximum_suppression(boxes, scores, iou_threshold=threshold)
    wanted = brute_force_nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold)
    assert found.tolist() == wanted.tolist()
    assert found.dtype == np.int64
    assert np.all(np.diff(scores[found]) <= 0)


def test_a_box_at_the_threshold_stays_and_one_above_it_goes() -> None:
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 2.001], [9, 9, 9, 9], [9, 9, 9, 9]], np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.2, 0.1], np.float32)
    assert non_maximum_suppression(boxes[:2], scores[:2], iou_threshold=0.5).tolist() == [0, 1]
    assert non_maximum_suppression(boxes[[0, 2]], scores[[0, 2]], iou_threshold=0.5).tolist() == [0]
    assert non_maximum_suppression(boxes[3:], scores[3:], iou_threshold=0.5).tolist() == [0, 1], "none has an area"


def test_no_boxes_leave_no_boxes() -> None:
    assert non_maximum_suppression(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), iou_threshold=0.5).size == 0


def test_many_boxes() -> None:
    source = np.random.default_rng(0)
    low = source.uniform(0, 900, (1500, 2)).astype(np.float32)
    boxes = np.concatenate([low, low + source.uniform(5, 300, (1500, 2)).astype(np.float32)], axis=1)
    scores = source.permutation(1500).astype(np.float32)
    found = non_maximum_suppression(boxes, scores, iou_threshold=0.3)
    wanted = brute_force_nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3)
    assert found.tolist() == wanted.tolist()
    assert 10 < len(found) < 1400


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_masks_survive_their_run_lengths(share: float) -> None:
    masks = np.random.default_rng(1).random((3, 13, 7)) < share
    for mask, rle in zip(masks, _mask_to_rle(torch.from_numpy(masks)), strict=True):
        found = mask_of(rle)
        assert found.dtype == np.bool_
        assert np.array_equal(found, mask)
        assert np.array_equal(found, _rle_to_mask(rle))
