"""The parameters of `FleetPipeline.stream`: a text can be read while it is written only if it is one text, and new."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefleet.errors import ParameterError
from pipefleet.tasks import TaskSpec

_FULL = "return_full_text"
_ONE_TEXT = "num_return_sequences"
_TOKENS = ("return_tensors", "return_type")


def streamed_parameters(spec: TaskSpec, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call whose text is read piece by piece. Raises ParameterError for parameters that forbid this."""
    if _FULL not in spec.parameters:
        raise ParameterError(f"{spec.name} writes no text that can be streamed; call the pipeline instead")
    if parameters.get(_FULL):
        raise ParameterError("stream() gives the new text alone: leave return_full_text out")
    if _count(parameters) > 1:
        raise ParameterError("stream() gives one text: leave num_return_sequences out, or call the pipeline")
    tokens = next((name for name in _TOKENS if parameters.get(name) is not None), None)
    if tokens is not None:
        raise ParameterError(f"stream() gives text: leave {tokens} out, or call the pipeline")
    kept = {name: value for name, value in parameters.items() if name != "return_text"}
    return {**kept, _FULL: False}


def _count(parameters: Mapping[str, Any]) -> int:
    """How many texts a call asks for. The table's checks refuse another type later."""
    nested = parameters.get("generate_kwargs")
    given = [parameters.get(_ONE_TEXT), nested.get(_ONE_TEXT) if isinstance(nested, Mapping) else None]
    return max((one for one in given if isinstance(one, int)), default=1)
