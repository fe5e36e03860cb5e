"""Whether two contenders gave the same answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.benchmarks.workloads import Workload

COSINE, SCORE = 0.999, 0.01
ENOUGH = 0.95
"""Share of agreeing outputs below which a row's time does not count."""
RULE = f"cosine above {COSINE}, the same text, or the same best label with scores within {SCORE}"


def agree(workload: Workload, ours: dict[str, Any], reference: dict[str, Any]) -> float:
    """The share of items on which two contenders agree, of the items that both have; 0 where they share none."""
    shared = [name for name in ours if name in reference]
    return sum(same(workload.task, ours[name], reference[name]) for name in shared) / max(1, len(shared))


def same(task: str, mine: Any, other: Any) -> bool:
    """Whether two outputs of a task agree, by `RULE`."""
    if task == "feature-extraction":
        a, b = np.asarray(mine, dtype=np.float64).ravel(), np.asarray(other, dtype=np.float64).ravel()
        return bool(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > COSINE)
    if task == "automatic-speech-recognition":
        return bool(mine["text"] == other["text"])
    top, wanted = (value[0] if isinstance(value, list) else value for value in (mine, other))
    return bool(top["label"] == wanted["label"] and abs(top["score"] - wanted["score"]) < SCORE)
