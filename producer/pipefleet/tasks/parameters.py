"""The parameters of a call: as JSON, checked, and laid over those of the pipeline in the way of transformers.

Arguments of generate() come in three ways there: as keywords, inside `generate_kwargs`, and as a GenerationConfig. A keyword of a
call goes before its `generate_kwargs`, these before its config, and a call before its pipeline. A config takes the place of
what the pipeline had asked for, and so does a None for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefleet.errors import ParameterError
from pipefleet.tasks import TaskSpec
from pipefleet.tasks.generation import GENERATION
from pipefleet.tasks.refused import asks_for_nothing, why_refused
from pipefleet.tasks.values import plain

_LIBRARIES = ("pt", "np")
"""Names that a tokenizer takes for `return_tensors`. Pipelines read any of them as True."""
_NESTED, _CONFIG = "generate_kwargs", "generation_config"
_NESTS = {_NESTED, "forward_params", "tokenize_kwargs"}
"""Mappings whose arguments may also come as keywords."""
_STOPS = {"stop", "stop_sequence", "stop_strings"}
_SHOWN = {"return_full_text", "return_tensors", "return_type"}
"""Three names of one choice. A call that uses one of them replaces the choice of its pipeline under any of the names."""


def called_parameters(spec: TaskSpec, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of a call as JSON. Raises ParameterError for a parameter that the task does not take."""
    if not isinstance(given, Mapping | None):
        spec.check(given)
    found = _as_meant(spec, {name: plain(value) for name, value in (given or {}).items()})
    for name in (_NESTED, _CONFIG):
        if isinstance(found.get(name), Mapping):
            found[name] = _as_meant(spec, found[name])
    found = _without_config(spec, found)
    if found.get("return_tensors") in _LIBRARIES and "return_tensors" in spec.parameters:
        found["return_tensors"] = True
    spec.check(found)
    return found


def layered(spec: TaskSpec, below: Mapping[str, Any], called: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call laid over those of its pipeline or pool.

    None in a call says nothing, unless None is a value of the parameter. An argument of the call replaces the pipeline's in every
    form: as a keyword or inside a mapping, and under any of several names of one choice.
    """
    if not below:
        return dict(called)
    called = {
        name: value
        for name, value in called.items()
        if value is not None or name in spec.nones or name not in spec.parameters
    }
    said = _said(spec, called)
    kept = {
        name: _without(value, said) if name in _NESTS else value for name, value in below.items() if name not in said
    }
    if _SHOWN & kept.keys() and "return_text" in spec.parameters:
        called.pop("return_text", None)  # it would be refused beside them, and by itself it changes nothing
    merged = {**kept, **called}
    for name in spec.merges & kept.keys() & called.keys():
        if isinstance(called[name], Mapping):
            merged[name] = {**kept[name], **called[name]}
    return merged


def _said(spec: TaskSpec, called: Mapping[str, Any]) -> set[str]:
    """The names of arguments for which the call alone counts."""
    said = called.keys() - _NESTS - spec.merges
    for name in _NESTS & called.keys():
        said |= set(called[name]) if isinstance(called[name], Mapping) else set()
    if _CONFIG in called and _takes_config(spec):
        said |= _NESTS | {name for name in GENERATION if name in spec.parameters}
    if said & _STOPS:
        said |= _STOPS
    return said | _SHOWN | {"return_text"} if said & _SHOWN else said


def _without(nest: Any, said: set[str]) -> Any:
    return {name: value for name, value in nest.items() if name not in said} if isinstance(nest, Mapping) else nest


def _takes_config(spec: TaskSpec) -> bool:
    return "max_new_tokens" in spec.parameters


def _as_meant(spec: TaskSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _exact(spec, name, value) for name, value in _without_nothing(spec, given).items()}


def _exact(spec: TaskSpec, name: str, value: Any) -> Any:
    """0 and 1 as False and True, and 4.0 as 4, where the parameter takes only those: tables and config files know no better."""
    check = spec.parameters.get(name)
    if check is None or type(value) not in (int, float) or check(value) is None or value != value // 1:
        return value
    others = [one for one in (int(value), bool(value)) if one == value and check(one) is None]
    return others[0] if others else value


def _without_nothing(spec: TaskSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without those that are refused and ask for nothing."""
    return {
        name: value
        for name, value in given.items()
        if name in spec.parameters or not asks_for_nothing(str(name), value) or not why_refused(spec.name, str(name))
    }


def _without_config(spec: TaskSpec, found: dict[str, Any]) -> dict[str, Any]:
    """The parameters with the arguments of their generation config, which count less than those beside it."""
    if not isinstance(found.get(_CONFIG), Mapping) or not _takes_config(spec):
        return {name: value for name, value in found.items() if name != _CONFIG or value is not None}
    config = dict(found.pop(_CONFIG))
    own = dict(found.get(_NESTED) or {}) if _NESTED in spec.parameters else {}
    if unknown := sorted(name for name in config if name not in spec.parameters):
        raise ParameterError(f"generation_config holds {unknown[0]!r}, which {spec.name} takes from no call")
    hidden = {name: value for name, value in config.items() if name not in found and name not in own}
    return {**hidden, **found}
