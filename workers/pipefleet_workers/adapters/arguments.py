"""Turns job parameters into the three argument sets of a transformers pipeline: preprocess, forward, postprocess.

`Adapter.parse` calls it. Parameters that the pipeline refuses raise ItemError (bad_parameter).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.messages import encode_json
from pipefleet_workers.items import ItemError

STAGE = "preprocess"
REMEMBERED = 1024
"""Number of parameter sets whose arguments are kept; the jobs of one caller usually share a few sets."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """The argument sets of one pipeline call. Calls with an equal `forward_key` may share a forward."""

    preprocess: Mapping[str, Any]
    forward: Mapping[str, Any]
    postprocess: Mapping[str, Any]
    forward_key: str

    def fresh(self) -> Arguments:
        """A copy that shares no mutable value with this one: pipelines write into their arguments."""
        return Arguments(_copied(self.preprocess), _copied(self.forward), _copied(self.postprocess), self.forward_key)


_OF_SAMPLING = ("temperature", "top_k", "top_p")
"""Arguments that generate() warns of where nothing is drawn."""
_PLAIN = (str, int, float, bool, type(None))


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy. Most arguments are plain values, for which this takes a tenth of the time of `copy.deepcopy`."""
    return {name: value if isinstance(value, _PLAIN) else copy.deepcopy(value) for name, value in arguments.items()}


def with_forward(arguments: Arguments, more: Mapping[str, Any]) -> Arguments:
    """The arguments with `more` forward arguments."""
    if not more:
        return arguments
    forward = {**arguments.forward, **more}
    return Arguments(arguments.preprocess, forward, arguments.postprocess, _key(forward))


def _key(forward: Mapping[str, Any]) -> str:
    return encode_json(sorted((name, repr(value)) for name, value in forward.items()))


class ArgumentParser:
    """Parses parameters with the pipeline's own `_sanitize_parameters`, once for each distinct set. Thread-safe."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self._known: dict[str, Arguments] = {}

    def parse(self, parameters: Mapping[str, Any]) -> Arguments:
        """The arguments for `parameters`. Raises ItemError (bad_parameter) with the pipeline's own words."""
        key = encode_json(sorted(parameters.items()))
        with self._lock:
            if key not in self._known:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                self._known[key] = self._parse(parameters)
            return self._known[key]

    def _parse(self, parameters: Mapping[str, Any]) -> Arguments:
        pipe = self._pipe
        try:
            sets = pipe._sanitize_parameters(**_with_return_type(pipe, copy.deepcopy(dict(parameters))))
        except (TypeError, ValueError, KeyError) as error:
            raise ItemError(
                "bad_parameter", f"the pipeline refuses the parameters: {str(error)[:300]}", STAGE
            ) from None
        defaults = (pipe._preprocess_params, pipe._forward_params, pipe._postprocess_params)
        pre, forward, post = ({**default, **own} for default, own in zip(defaults, sets, strict=True))
        return Arguments(pre, forward, post, _key(forward))


def _with_return_type(pipe: Any, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with a numeric ReturnType converted to the pipeline's own type: each pipeline module has its own."""
    kind = parameters.get("return_type")
    modules = (sys.modules[one.__module__] for one in type(pipe).__mro__)
    own = next((module.ReturnType for module in modules if hasattr(module, "ReturnType")), None)
    return parameters if kind is None or own is None else {**parameters, "return_type": own(kind)}


def generate_arguments(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of generate() for one call: `given`, and the pipeline's own defaults where the model sets nothing.

    The pipelines of older transformers have no method for it: they keep their defaults in a config of their own.
    """
    prepare = getattr(pipe, "_prepare_generate_kwargs", None)
    if prepare is not None:
        return dict(prepare(dict(given)))
    if given.get("generation_config") is not None:
        return dict(given)
    models, own = pipe.model.generation_config, pipe.generation_config
    of_all: Mapping[str, Any] = getattr(own, "_get_default_generation_params", dict)()
    defaults = {
        name: value
        for name, value in own.to_diff_dict().items()
        if getattr(models, name, value) != value and of_all.get(name) != value
    }
    if not given.get("do_sample", defaults.get("do_sample", models.do_sample)):
        defaults = {name: value for name, value in defaults.items() if name not in _OF_SAMPLING}
    return {**defaults, **given}
