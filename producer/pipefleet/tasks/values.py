"""Values of parameters as JSON has them: numbers of numpy and torch, arrays, enums, tuples, sets, generation configs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pipefleet.errors import ParameterError

MOST_NUMBERS = 100_000
"""Numbers of the largest array that a parameter may be."""
_PLAIN = (str, bool, int, float, type(None))


def plain(value: Any) -> Any:
    """The JSON form of a value. A value without a JSON form is returned unchanged; the parameter's check will refuse it.

    A mapping whose keys are tuples of tokens, such as `sequence_bias`, becomes a list of pairs. Raises ParameterError for an
    array of more than `MOST_NUMBERS` numbers.
    """
    if isinstance(value, Enum):
        return value.value
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        if value and all(isinstance(name, tuple) for name in value):
            return [[plain(name), plain(one)] for name, one in value.items()]
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return [plain(one) for one in sorted(value, key=str)]
    if hasattr(value, "to_diff_dict"):
        return _settings(value)
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        return _numbers(value)
    return value


def _numbers(value: Any) -> Any:
    """A number of numpy or torch as a number; an array or a tensor as lists of numbers."""
    count = math.prod(value.shape)
    if count > MOST_NUMBERS:
        raise ParameterError(f"a parameter has {count} numbers, it may have {MOST_NUMBERS}")
    return value.tolist()


def _settings(config: Any) -> dict[str, Any]:
    """The settings of a generation config that differ from transformers' own defaults."""
    given = config.to_diff_dict()
    return {name: plain(one) for name, one in given.items() if name != "transformers_version" and name[:1] != "_"}
