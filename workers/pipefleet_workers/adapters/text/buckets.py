"""The few lengths that a compiled model runs with: powers of two and the numbers half-way between.

Each new length costs a compilation, so `TextEncoder.collate` pads batches to these lengths, and `models.compiled` compiles them.
"""

from __future__ import annotations

SHORTEST = 16


def rounded_length(length: int, bound: int | None = None) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96 … that is not below `length`; at most `bound`, if there is a bound.

    For a `length` from 16 on, the result is at most 1.5 times `length`.
    """
    rounded = SHORTEST
    while rounded < length:
        between = rounded + rounded // 2
        rounded = between if length <= between else 2 * rounded
    return rounded if bound is None else max(length, min(rounded, bound))
