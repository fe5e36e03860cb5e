"""Checks of arguments that users pass to our own calls: texts, whole numbers and seconds.

A value of any type comes in; a value of the right type goes out. A wrong value raises InputError or ParameterError, whose sentence
names the argument. `Client`, `Job`, `Run` and the pipelines call these functions.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

from pipefleet.errors import InputError, ParameterError


def text_of(name: str, value: object) -> str:
    """A text. Raises InputError for anything else."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, not {type(value).__name__}")
    return value


def seconds_of(value: Any) -> float | None:
    """Seconds as a number, of numpy too; None for what is no such number. Infinity is one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:
        return math.inf
    return None if math.isnan(found) else found


def timeout_of(value: Any) -> float | None:
    """How long to wait for a result, None for without end. Raises ParameterError for what says neither."""
    if value is None:
        return None
    found = seconds_of(value)
    if found is None:
        raise ParameterError(f"timeout must be a number of seconds or None, not {str(value)[:40]!r}")
    return found


def whole_of(name: str, value: Any) -> int:
    """A whole number, of numpy too. Raises ParameterError for anything else."""
    try:
        return operator.index(value)
    except TypeError:
        raise ParameterError(f"{name} must be a whole number, not {type(value).__name__}") from None
