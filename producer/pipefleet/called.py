"""The parameters of a call: as JSON, checked, and laid over those of the pipeline as transformers does it.

Arguments of generate() come in three ways there: as keywords, inside `generate_kwargs`, and as a GenerationConfig. A keyword of a
call goes before its `generate_kwargs`, these before its config, and a call before its pipeline. A config takes the place of
what the pipeline had asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipefleet.errors import ParameterError
from pipefleet.plain import plain
from pipefleet.refused_parameters import why_refused
from pipefleet.tasks import TaskSpec
from pipefleet.tasks.generation import GENERATION

_LIBRARIES = ("pt", "np")
"""Names that a tokenizer takes for `return_tensors`. Pipelines read any of them as True."""
_NESTED, _CONFIG = "generate_kwargs", "generation_config"


def called_parameters(spec: TaskSpec, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of a call as JSON. Raises ParameterError for those that the task does not take."""
    if not isinstance(given, Mapping | None):
        spec.check(given)
    found = _without_nothing(spec, {name: plain(value) for name, value in (given or {}).items()})
    for name in (_NESTED, _CONFIG):
        if isinstance(found.get(name), Mapping):
            found[name] = _without_nothing(spec, found[name])
    found = _without_config(spec, found)
    if found.get("return_tensors") in _LIBRARIES and "return_tensors" in spec.parameters:
        found["return_tensors"] = True
    spec.check(found)
    return found


def layered(spec: TaskSpec, below: Mapping[str, Any], called: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call laid over those of its pipeline or pool."""
    if not below:
        return dict(called)
    names = _generation_names(spec)
    if called.get(_CONFIG) is not None and _takes_config(spec):
        below = {name: value for name, value in below.items() if name not in names and name != _NESTED}
    merged = {**below, **called}
    if _NESTED not in spec.parameters or not isinstance(merged.get(_NESTED), Mapping):
        return merged
    keywords = below.keys() & names
    if not (keywords or (_NESTED in below and called.keys() & names)):
        return merged  # nothing is asked for twice
    replaced = _NESTED in called and not spec.merges_generation
    nested: Mapping[str, Any] = {} if replaced else below.get(_NESTED) or {}
    over = {name: value for name, value in called.items() if name in names}
    own = {**{name: below[name] for name in keywords}, **nested, **(called.get(_NESTED) or {}), **over}
    return {**{name: value for name, value in merged.items() if name not in names}, _NESTED: own}


def _generation_names(spec: TaskSpec) -> set[str]:
    return {name for name in GENERATION if name in spec.parameters}


def _takes_config(spec: TaskSpec) -> bool:
    return "max_new_tokens" in spec.parameters


def _without_nothing(spec: TaskSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without those that are refused and None, which ask for nothing."""
    taken = spec.parameters
    return {
        name: value
        for name, value in given.items()
        if value is not None or name in taken or not why_refused(spec.name, str(name))
    }


def _without_config(spec: TaskSpec, found: dict[str, Any]) -> dict[str, Any]:
    """What a generation config says as parameters, below those that stand beside it."""
    if not isinstance(found.get(_CONFIG), Mapping) or not _takes_config(spec):
        return {name: value for name, value in found.items() if name != _CONFIG or value is not None}
    config = dict(found.pop(_CONFIG))
    own = dict(found.get(_NESTED) or {}) if _NESTED in spec.parameters else {}
    if unknown := sorted(name for name in config if name not in spec.parameters):
        raise ParameterError(f"generation_config holds {unknown[0]!r}, which {spec.name} takes from no call")
    hidden = {name: value for name, value in config.items() if name not in found and name not in own}
    return {**hidden, **found}
