"""Checkpoints saved in half precision: a pool without a dtype computes in theirs and gives the numbers of transformers.pipeline."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from pipefleet.fleet.pools import Pool
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.models.load import load_pipeline
from tests.parity.cases import CASES, Case
from tests.parity.half import in_dtype
from tests.parity.harness import assert_same, plain, recording, running

FIRST = list({case.task: case for case in reversed(CASES)}.values())
"""One case of each task."""
LIMITS = {"float16": 1e-3, "bfloat16": 2e-2}
"""Sums in another order differ by this much; computed in float32, most results differ by more."""
FAILS = ("ScalarType BFloat16", "should be the same")
"""What the expectation itself raises: transformers' postprocessing hands bfloat16 to NumPy, and that of image-to-image, which
transformers 5 does not have, gives the model float32. The fleet answers there."""


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("case", FIRST, ids=lambda case: case.task)
def test_every_task_in_half_precision(case: Case, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("tests.parity.harness.TOLERANCE", LIMITS[dtype])
    folder = in_dtype(case.checkpoint, dtype, tmp_path / "model")
    call = case.calls(tmp_path)[0]
    theirs = transformers.pipeline(RUNTIME[case.task].transformers_task or case.task, model=str(folder), device="cpu")
    ours = load_pipeline(Pool("half", case.task, str(folder), device="cpu"))
    assert ours.dtype == theirs.dtype == getattr(torch, dtype)
    with running(recording(RUNTIME[case.task].adapter, ours), case.task) as engine:
        (outcome,) = engine.run([copy.deepcopy(call)])
    assert outcome.failure is None
    try:
        wanted = case.expected(theirs, call)
    except (TypeError, RuntimeError) as error:
        assert any(words in str(error) for words in FAILS)  # noqa: PT017 - other errors are the test's failure
        assert _finite(plain(outcome.output))
    else:
        assert_same(outcome.output, wanted)


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float | np.ndarray) or bool(np.isfinite(value).all())
