"""Parameters that say in which form a written text is returned. Within one call some of them exclude each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FORMS = ("return_type", "return_full_text", "return_tensors")
LIBRARIES = ("pt", "np")
"""Names that a tokenizer takes for `return_tensors`. Pipelines read any of them as True."""
_FORMLESS = "return_text"
"""Chooses no form of its own, and excludes two of the others."""


def with_one_form(
    taken: Mapping[str, Any], below: Mapping[str, Any], called: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The parameters of a pipeline and those of a call without what would exclude something in the other one.

    As in transformers, a form of the call takes the place of its pipeline's. What excludes itself within one of them stays, to be
    refused. `taken` are the parameters of the task.
    """
    if "return_full_text" not in taken:
        return below, called
    if any(called.get(name) is not None for name in _FORMS):
        return {name: value for name, value in below.items() if name not in (*_FORMS, _FORMLESS)}, called
    if any(below.get(name) is not None for name in _FORMS):
        return below, {name: value for name, value in called.items() if name != _FORMLESS}
    return below, called
