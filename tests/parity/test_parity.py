"""Every row of `cases.CASES`: alone and batched with other inputs and parameters, the engine equals the pipeline."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.items import Outcome
from tests.parity.cases import CASES, Case
from tests.parity.harness import Call, assert_same, load, plain, recording, running

_BOX = ("score", "label", "box.xmin", "box.ymin", "box.xmax", "box.ymax")
FIELDS = {
    "automatic-speech-recognition": ("text", "chunks.text", "chunks.timestamp", "chunks.language"),
    "token-classification": ("entity", "entity_group", "score", "index", "word", "start", "end"),
    "question-answering": ("score", "start", "end", "answer"),
    "table-question-answering": ("answer", "coordinates", "cells", "aggregator"),
    "document-question-answering": ("score", "answer", "start", "end"),
    "fill-mask": ("score", "token", "token_str", "sequence"),
    "object-detection": _BOX,
    "zero-shot-object-detection": _BOX,
    "image-segmentation": ("score", "label", "mask"),
    "mask-generation": ("masks", "scores", "rle_mask.size", "rle_mask.counts", "bounding_boxes"),
    "depth-estimation": ("predicted_depth", "depth"),
    "keypoint-matching": (
        *(f"keypoint_image_{side}.{axis}" for side in (0, 1) for axis in "xy"),
        "score",
    ),
    "text-to-audio": ("audio",),
    "video-classification": ("score", "label"),
}
"""Fields beside a text or a label that lie somewhere in the input: each must be compared where it differs."""


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Call], list[Any]]]:
    """Calls and their results by case, filled as cases run; each pipeline is called with one input at a time."""
    return {}


def expectations(
    case: Case, known: dict[str, tuple[list[Call], list[Any]]], folder: Path
) -> tuple[list[Call], list[Any]]:
    if case.id not in known:
        pipe, calls = load(case.checkpoint), case.calls(folder)
        known[case.id] = calls, [case.expected(pipe, call) for call in calls]
    return known[case.id]


def check(outcomes: list[Outcome], calls: list[Call], results: list[Any]) -> None:
    for index, (outcome, result) in enumerate(zip(outcomes, results, strict=True)):
        where = f"call {index} with {dict(calls[index].parameters)}"
        assert outcome.failure is None, f"{where}: {outcome.failure}"
        assert_same(outcome.output, result, where)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_alone(case: Case, wanted: dict[str, Any], tmp_path: Path) -> None:
    calls, results = expectations(case, wanted, tmp_path)
    with running(recording(RUNTIME[case.task].adapter, load(case.checkpoint)), case.task) as engine:
        check([engine.run([call])[0] for call in calls], calls, results)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_together(case: Case, wanted: dict[str, Any], tmp_path: Path) -> None:
    calls, results = expectations(case, wanted, tmp_path)
    adapter = recording(RUNTIME[case.task].adapter, load(case.checkpoint))
    with running(adapter, case.task) as engine:
        check(engine.run_together(calls), calls, results)
    assert max(len(batch.units) for batch in adapter.batches) >= case.shares, (
        "nothing was batched: the case shows nothing"
    )
    if case.ragged:
        assert any(len({unit.length for unit in batch.units}) > 1 for batch in adapter.batches)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_inputs_of_a_case_have_different_results(case: Case, wanted: dict[str, Any], tmp_path: Path) -> None:
    """Else a result in the wrong place would go unseen."""
    _, results = expectations(case, wanted, tmp_path)
    assert len({repr(result) for result in results}) > 1


@pytest.mark.parametrize("task", sorted(FIELDS))
def test_every_field_of_a_result_tells_one_input_from_another(
    task: str, wanted: dict[str, Any], tmp_path: Path
) -> None:
    """Else a field that depends on the neighbours would be equal by accident."""
    seen: dict[str, set[str]] = defaultdict(set)
    for case in CASES:
        if case.task == task:
            for result in expectations(case, wanted, tmp_path)[1]:
                note_fields(plain(result), "", seen)
    assert {name: len(seen[name]) > 1 for name in FIELDS[task]} == dict.fromkeys(FIELDS[task], True)


def note_fields(value: Any, name: str, seen: dict[str, set[str]]) -> None:
    """Note the values of the fields of a result by their names, as `box.xmin`, whatever lists they lie in."""
    if isinstance(value, dict):
        for key, one in value.items():
            note_fields(one, f"{name}.{key}" if name else key, seen)
    elif isinstance(value, list) and value:
        for one in value:
            note_fields(one, name, seen)
    else:
        seen[name].add(value.tobytes().hex() if isinstance(value, np.ndarray) else repr(value))


def test_both_halves_of_the_task_table_have_the_same_rows() -> None:
    assert set(RUNTIME) == set(TASKS)


def test_every_task_has_a_parity_case() -> None:
    assert {case.task for case in CASES} == set(RUNTIME)
