"""How far two results of one model lie apart. The proofs of the warm-up compare the result with the tolerance of the dtype."""

from __future__ import annotations

from typing import Any

import numpy as np


def relative(mine: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The largest difference, relative to the largest number of `other`; infinite if the shapes differ."""
    if mine.shape != other.shape:
        return float("inf")
    scale = max(1e-6, float(np.abs(other).max()))
    return float(np.abs(mine - other).max()) / scale
