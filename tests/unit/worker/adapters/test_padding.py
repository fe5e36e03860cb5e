"""Tensors of unequal sizes in one tensor."""

from __future__ import annotations

import torch

from pipefleet_workers.adapters.padding import pad, pad_features


def test_every_dimension_is_filled_up_behind_its_end() -> None:
    wide, high = torch.ones(1, 1, 3), torch.full((1, 2, 1), 2.0)
    assert pad([wide, high], 9).tolist() == [[[1, 1, 1], [9, 9, 9]], [[2, 9, 9], [2, 9, 9]]]
    assert pad([wide, wide], 9).tolist() == [[[1, 1, 1]], [[1, 1, 1]]]


def test_the_dtype_stays() -> None:
    assert pad([torch.ones(1, 2, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)], 0).dtype == torch.long


def test_the_attention_mask_hides_the_padding() -> None:
    rows = [{"input_ids": torch.ones(1, size), "attention_mask": torch.ones(1, size)} for size in (1, 2)]
    found = pad_features(rows, 7)
    assert found["input_ids"].tolist() == [[1, 7], [1, 1]]
    assert found["attention_mask"].tolist() == [[1, 0], [1, 1]]
