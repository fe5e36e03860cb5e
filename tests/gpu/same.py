"""Compares results of two devices: texts, labels, shapes and order are equal, numbers nearly.

`differences` gives sentences; none means that the results agree. The checks of tasks and the benchmark call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.parity.harness import plain

PIXELS = 0.005
"""Share of the pixels of a mask or picture that may fall on the other side of a threshold."""


def differences(found: Any, wanted: Any, tolerance: float) -> list[str]:
    """Where two results differ. Numbers may differ by `tolerance`, relative to the largest number of their array."""
    return list(_differ(plain(found), plain(wanted), tolerance, "result"))


def _differ(found: Any, wanted: Any, tolerance: float, where: str) -> Iterator[str]:
    if isinstance(found, np.ndarray) or isinstance(wanted, np.ndarray):
        yield from _arrays(np.asarray(found), np.asarray(wanted), tolerance, where)
    elif isinstance(wanted, dict) and isinstance(found, dict):
        if list(found) != list(wanted):
            yield f"{where} has {list(found)}, not {list(wanted)}"
            return
        for name in wanted:
            yield from _differ(found[name], wanted[name], tolerance, f"{where}.{name}")
    elif isinstance(wanted, list) and isinstance(found, list):
        if len(found) != len(wanted):
            yield f"{where} has {len(found)} entries, not {len(wanted)}"
            return
        for index, (mine, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _differ(mine, other, tolerance, f"{where}[{index}]")
    elif isinstance(wanted, float) and isinstance(found, float):
        if not abs(found - wanted) <= tolerance * max(1.0, abs(wanted)):  # true for what is no number, too
            yield f"{where} is {found}, not {wanted}"
    elif (type(found), found) != (type(wanted), wanted):
        yield f"{where} is {found!r}, not {wanted!r}"


def _arrays(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], tolerance: float, where: str) -> Iterator[str]:
    if found.shape != wanted.shape:
        yield f"{where} has the shape {found.shape}, not {wanted.shape}"
        return
    apart = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    if wanted.dtype in (np.uint8, np.bool_):
        share = float((apart > (wanted.dtype == np.uint8)).mean()) if apart.size else 0.0
        if share > PIXELS:
            yield f"{where} differs in {share:.1%} of its pixels"
    elif apart.size and not float(apart.max()) <= tolerance * max(1.0, float(np.abs(wanted).max())):
        yield f"{where} differs by up to {apart.max():.2e}"
