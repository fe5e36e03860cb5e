"""The adapter of image-feature-extraction: a picture goes in; hidden states, the pooled vector, or feature maps come out.

Pictures of one shape share a batch. Feature maps come from the model's backbone, which is made once and shares the model's weights.
A model without a backbone, and a stage that it does not have, raise ItemError (bad_parameter).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoBackbone

from pipefleet.contract.records import JobFailure
from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_OF_A_BACKBONE = ("out_indices", "out_features")


class ImageFeatures(Adapter):
    """image-feature-extraction. With `out_indices` the result is a list of feature maps `[1, channels, height, width]`.

    The maps equal the maps of `AutoBackbone.from_pretrained(model, out_indices=…)`; their order is the order of the request.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._lock = threading.Lock()
        self._backbone: Any = None

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The model's outputs, still on the device; a list of feature maps for units that asked for maps."""
        pipe = self.pipe
        model = self._backbone if units[0].key[-1] else pipe.model
        with torch.no_grad():
            outputs = model(**pipe._ensure_tensor_on_device(inputs, device=pipe.device))
        return list(outputs.feature_maps) if units[0].key[-1] else outputs

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """For each unit its float32 array, or its list of arrays; each output leaves the device at most once."""
        return self._maps(outputs, units) if units[0].key[-1] else self._states(outputs, units)

    def finish(self, assembly: Assembly) -> Any:
        """The array itself; it is written as nested lists of numbers, or stored as an object when it is large."""
        return assembly.outputs[0]

    def parse(self, parameters: Mapping[str, Any]) -> Arguments:
        """The pipeline's arguments, without `out_indices` and `out_features`, which belong to a backbone."""
        return super().parse({name: value for name, value in parameters.items() if name not in _OF_A_BACKBONE})

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        maps = any(decoded.work.parameters.get(name) is not None for name in _OF_A_BACKBONE)
        if maps:
            self._wanted(decoded.work.parameters)
        (unit,) = super()._prepare(decoded)
        unit.key = (unit.key, maps)
        return [unit]

    def _states(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        pooled = [bool(self.arguments(unit).postprocess.get("pool")) for unit in units]
        rows = {
            True: _on_host(outputs["pooler_output"]) if any(pooled) and "pooler_output" in outputs else None,
            False: None if all(pooled) else _on_host(outputs[0]),
        }
        return [_row(rows[pool], index) for index, pool in enumerate(pooled)]

    def _maps(self, outputs: Sequence[torch.Tensor], units: Sequence[Unit]) -> list[Any]:
        wanted = [self._wanted(unit.assembly.work.parameters) for unit in units]
        maps = {index: _on_host(outputs[index]) for index in {one for indices in wanted for one in indices}}
        return [[_row(maps[one], index) for one in indices] for index, indices in enumerate(wanted)]

    def _wanted(self, parameters: Mapping[str, Any]) -> list[int]:
        """The stages that `out_indices` or `out_features` names, counted from 0. Raises ItemError (bad_parameter)."""
        with self._lock:
            if self._backbone is None:
                self._backbone = backbone_of(self.pipe.model)
        names: list[str] = list(self._backbone.stage_names)
        if parameters.get("out_indices") is None:
            return _named(names, parameters["out_features"])
        if parameters.get("out_features") is not None:
            raise ItemError("bad_parameter", "out_indices and out_features say the same; pass one of them", STAGE)
        count, asked = len(names), parameters["out_indices"]
        wrong = [one for one in asked if not -count <= one < count]
        if wrong or not asked:
            text = f"out_indices holds {wrong[0]}" if wrong else "out_indices is empty"
            raise ItemError("bad_parameter", f"{text}; the model has the stages 0 to {count - 1}", STAGE)
        return [one % count for one in asked]


def _named(stages: list[str], asked: Sequence[str]) -> list[int]:
    """The stages with these names, counted from 0. Raises ItemError (bad_parameter)."""
    unknown = [one for one in asked if one not in stages]
    if unknown or not asked:
        text = f"out_features holds {unknown[0]!r}" if unknown else "out_features is empty"
        raise ItemError("bad_parameter", f"{text}; the model has the stages {', '.join(stages)}", STAGE)
    return [stages.index(one) for one in asked]


def backbone_of(model: Any) -> Any:
    """The backbone of a base model, with the feature maps of all stages; it shares the weights. Raises ItemError (bad_parameter).

    A backbone adds a norm after each stage. These norms are untrained and change nothing, as in `AutoBackbone.from_pretrained`.
    """
    config = copy.deepcopy(model.config)
    try:
        config.out_indices = list(range(len(config.stage_names)))
        backbone = AutoBackbone.from_config(config, dtype=model.dtype)
    except (AttributeError, ValueError, TypeError, ImportError):
        text = f"out_indices needs a model with a backbone in transformers, which {config.model_type!r} has not"
        raise ItemError("bad_parameter", text, STAGE) from None
    # Some backbones contain the base model as a part.
    weights, inside = model.state_dict(), f"{backbone.base_model_prefix}."
    names = {name: name if name in weights else name.removeprefix(inside) for name in backbone.state_dict()}
    shared = {name: weights[source] for name, source in names.items() if source in weights}
    missing, _ = backbone.load_state_dict(shared, strict=False, assign=True)
    unknown = [name for name in missing if "norm" not in name]
    if unknown:
        text = f"the model has no weights for {unknown[0]} and {len(unknown) - 1} others of its backbone"
        raise ItemError("bad_parameter", f"{text}; leave out out_indices", STAGE)
    return backbone.to(model.device).eval()


def _on_host(value: torch.Tensor) -> np.ndarray[Any, Any]:
    return value.float().cpu().numpy()


def _row(values: np.ndarray[Any, Any] | None, index: int) -> Any:
    if values is None:
        return JobFailure("bad_parameter", "the model has no pooled output; leave out pool", "forward")
    return values[index : index + 1].copy()
