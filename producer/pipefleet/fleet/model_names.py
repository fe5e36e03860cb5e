"""The arguments about the model of a call, as users pass them to transformers: names and paths pass, objects are refused.

`Client` and `pipeline()` call these functions. ParameterError says what to do with an object: no message can hold it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipefleet.errors import ParameterError
from pipefleet.fleet.loading import instead

_DEFAULTS = {"trust_remote_code": False, "use_fast": True}
"""Values that change nothing in transformers."""
_NAMED = ("config", "pipeline_class", "quantization_config")
"""Arguments whose objects are no part of a model's folder."""


def model_name(model: Any) -> str | None:
    """The name by which pools know a model: a text unchanged, a path to a local folder in full.

    Raises ParameterError for an object, with the next step.
    """
    if model is None:
        return None
    if isinstance(model, os.PathLike) or (isinstance(model, str) and model.startswith(("./", "../", "~"))):
        path = Path(os.fsdecode(model)).expanduser()
        is_name = isinstance(model, os.PathLike) and not path.is_absolute() and not path.is_dir()
        return path.as_posix() if is_name else str(path.resolve())
    if isinstance(model, str):
        return str(model)
    kind = type(model).__name__
    known = _name_of(model)
    hint = f"model={known!r}" if known else "the name of a pool's model as model="
    raise ParameterError(
        f"model is a name or a path, not an object of type {kind}: the fleet's workers load it themselves, so pass {hint}; "
        "weights that changed here are served from a folder: save_pretrained() it and name that folder in fleet.toml"
    )


def check_loading(parameters: Mapping[str, Any], names: set[str], model: str | None) -> None:
    """Raise ParameterError for an argument of `names` that would change how the pool loads its model.

    Passed over are defaults of transformers, and a tokenizer or processor with the name of the model: the pool finds it there.
    """
    for name in sorted(names & parameters.keys()):
        value = parameters[name]
        is_default = value is None or (name in _DEFAULTS and value is _DEFAULTS[name])
        is_default = is_default or (isinstance(value, Mapping) and not value)
        if is_default or (isinstance(value, str | os.PathLike) and model is not None and model_name(value) == model):
            continue
        if name == "model_kwargs" and not isinstance(value, Mapping):
            raise ParameterError(f"model_kwargs must be a dict, not an object of type {type(value).__name__}")
        if isinstance(value, str | os.PathLike | Mapping | bool) or name in _NAMED:
            raise ParameterError(f"{name} belongs to how a pool loads its model: {instead(name, value)}")
        kind = type(value).__name__
        raise ParameterError(
            f"{name} is loaded by the workers, so an object of type {kind} cannot be passed: save_pretrained() it into the "
            "model's folder and name that folder in fleet.toml"
        )


def _name_of(model: Any) -> str | None:
    """The name or path from which an object of transformers was loaded."""
    known = getattr(model, "name_or_path", None)
    return known if isinstance(known, str) and known else None
