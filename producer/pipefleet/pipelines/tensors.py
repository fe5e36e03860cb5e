"""Results that transformers gives as tensors: torch tensors if torch is installed, else numpy arrays, else lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any


def with_tensors(output: Any, keys: Sequence[str]) -> Any:
    """A result with tensors in the place of the values at `keys`. The key "" stands for the result itself.

    Numbers become float32, whole numbers int64. Feature maps of unlike shapes become a list of tensors.
    """
    return _tensors(output) if "" in keys else _at(output, keys)


def _at(value: Any, keys: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _tensors(one) if name in keys else _at(one, keys) for name, one in value.items()}
    return [_at(one, keys) for one in value] if isinstance(value, list) else value


def _tensors(value: Any) -> Any:
    try:
        import numpy
    except ImportError:
        return value
    try:
        array = numpy.asarray(value)
    except ValueError:  # parts of unlike shapes
        return [_tensors(one) for one in value]
    array = array.astype(numpy.float32 if array.dtype.kind == "f" else numpy.int64)
    try:
        torch = import_module("torch")  # the producer does not need torch; it uses the caller's
    except ImportError:
        return array
    return torch.from_numpy(array)
