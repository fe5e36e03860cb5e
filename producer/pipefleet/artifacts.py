"""Artifacts: parts of a result that lie beside its JSON line, and their way back to values.

A line refers to one as `{"$artifact": "s3://…/output.npy", "kind": "array", …}`. Reading needs the library of its kind only then.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from pipefleet.errors import ContractError, UsageError

ARTIFACT_KEY = "$artifact"


def is_artifact(value: object) -> bool:
    """True for what stands in a line for an artifact."""
    return isinstance(value, Mapping) and ARTIFACT_KEY in value


def resolve(value: Any, read: Callable[[str], bytes]) -> Any:
    """`value` with every artifact replaced by what it holds: an array for kind `array`. `read` gives the bytes of a URI.

    Raises UsageError when the library for a kind is not installed, ContractError for a kind this version does not know.
    """
    if is_artifact(value):
        return _load(value, read)
    if isinstance(value, Mapping):
        return {name: resolve(item, read) for name, item in value.items()}
    if isinstance(value, list):
        # Lists of numbers are most of what there is, and hold no artifacts.
        return [resolve(item, read) for item in value] if value and isinstance(value[0], Mapping | list) else value
    return value


def _load(reference: Mapping[str, Any], read: Callable[[str], bytes]) -> Any:
    if reference.get("kind") != "array":
        raise ContractError(f"an artifact of kind {str(reference.get('kind'))[:40]!r}: read it with a newer pipefleet")
    try:
        import numpy
    except ImportError:
        raise UsageError(
            "this result holds an array: pip install numpy, or read the artifact's .npy yourself"
        ) from None
    return numpy.load(io.BytesIO(read(str(reference[ARTIFACT_KEY]))), allow_pickle=False)
