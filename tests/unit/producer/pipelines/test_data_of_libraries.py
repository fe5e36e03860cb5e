"""Data, boxes and labels of an input as numpy, torch and pandas hold them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas
import pytest
import torch

from pipefleet.client import Client
from pipefleet.errors import InputError
from pipefleet.tasks import task_spec

URI = "s3://media/a.png"
PAGE, DETECT, TABLE = "document-question-answering", "zero-shot-object-detection", "table-question-answering"
WORDS, PLACES = ["sea", "wide"], [[0, 0, 90, 90], [100, 0, 190, 90]]
BOXES = [list(one) for one in zip(WORDS, PLACES, strict=True)]


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


GIVEN: list[tuple[str, str, Any, Any]] = [
    (PAGE, "word_boxes", list(zip(np.array(WORDS), np.array(PLACES), strict=True)), BOXES),
    (PAGE, "word_boxes", list(zip(WORDS, torch.tensor(PLACES), strict=True)), BOXES),
    (PAGE, "word_boxes", [(word, tuple(np.int64(one) for one in box)) for word, box in BOXES], BOXES),
    (PAGE, "word_boxes", tuple(zip(pandas.Series(WORDS), PLACES, strict=True)), BOXES),
    (DETECT, "candidate_labels", np.array(WORDS), WORDS),
    (DETECT, "candidate_labels", tuple(np.array(WORDS)), WORDS),
    (TABLE, "table", {"a": np.array([1, 2]), "b": pandas.Series(["x", None])}, {"a": ["1", "2"], "b": ["x", ""]}),
    (TABLE, "query", ("a", "b"), ["a", "b"]),
    ("decision", "state", {"a": np.float64(0.5), "b": (np.int32(1), torch.tensor([2]))}, {"a": 0.5, "b": [1, [2]]}),
]
OTHERS = {
    PAGE: {"image": URI, "question": "q"},
    DETECT: {"image": URI},
    TABLE: {"table": {"a": ["1"]}, "query": "q"},
    "decision": {"state": {}, "questions": {}},
}


@pytest.mark.parametrize(("task", "field", "value", "found"), GIVEN)
def test_values_of_libraries_travel_as_json(client: Client, task: str, field: str, value: Any, found: Any) -> None:
    prepared = client.preparer(task_spec(task)).prepare({**OTHERS[task], field: value})
    assert prepared[field] == found


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        (PAGE, "word_boxes", [("sea", object())]),
        (PAGE, "word_boxes", [("sea", np.array([0, 0, 2000, 1]))]),
        (PAGE, "word_boxes", {"sea"}),
        ("decision", "state", {"a": object()}),
        ("decision", "state", {"a": float("nan")}),
        ("decision", "state", nested(5000)),
        ("decision", "state", np.zeros(200_000)),
        (DETECT, "candidate_labels", np.array([1, 2])),
    ],
)
def test_what_is_no_json_is_an_error_of_the_call(client: Client, task: str, field: str, value: Any) -> None:
    with pytest.raises(InputError):
        client.preparer(task_spec(task)).prepare({**OTHERS[task], field: value})
