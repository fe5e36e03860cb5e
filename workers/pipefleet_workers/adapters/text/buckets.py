"""Lengths that compiled models are run with: powers of two and what lies half-way between, so that there are few."""

from __future__ import annotations

SHORTEST = 16


def rounded_length(length: int, bound: int | None = None) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96 … that is not below `length`; at most `bound`, where there is one.

    No more than half as long again as `length`, except below 16.
    """
    rounded = SHORTEST
    while rounded < length:
        between = rounded + rounded // 2
        rounded = between if length <= between else 2 * rounded
    return rounded if bound is None else max(length, min(rounded, bound))
