"""Tasks whose input is pictures or video alone."""

from __future__ import annotations

from tests.parity.cases.case import Case

CASES = (
    Case("image-classification", [{}, {"top_k": 1}, {"top_k": 2, "function_to_apply": "sigmoid"}], shares=4),
    Case("image-classification:convbn", [{}, {"function_to_apply": "none"}], shares=4),
)
