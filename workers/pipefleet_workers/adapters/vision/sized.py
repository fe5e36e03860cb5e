"""Adapters of tasks whose answers refer to the picture's own size: detection, segmentation, depth, matching of key points.

Tensors of equal shape share a batch, whatever the sizes of their pictures. Outputs that no postprocessing needs, such as hidden
states, stay on the device. Postprocessing resizes masks on the host, in the finish threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.base import Adapter, shape_key
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_UNUSED = ("hidden_state", "attentions", "auxiliary")
"""Parts of the names of outputs that no postprocessing reads; these outputs are most of the bytes."""
_MASKS_KEYPOINTS = ("superglue",)
"""Models of key points with a mask of their own, which hides the filler rows of a pair with fewer points."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The model's inputs for one item, and the size or sizes of its pictures."""

    tensors: Mapping[str, Any]
    size: Any


class SizedPictures(Adapter):
    """image-segmentation and object-detection; a subclass serves depth-estimation."""

    size_name = "target_size"
    """The pipeline's name for the size, in its preprocess and its postprocess."""

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Stacked tensors, or a single unit's inputs as they are."""
        pictures: list[Picture] = [unit.features for unit in units]
        if len(units) == 1:
            return dict(pictures[0].tensors)
        return super().collate([replace(unit, features=unit.features.tensors) for unit in units])

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The model's outputs that postprocessing needs, on the host, in the model's own dtype."""
        pipe = self.pipe
        with torch.no_grad():
            outputs = pipe.model(**pipe._ensure_tensor_on_device(inputs, device=pipe.device))
        kept = {name: value for name, value in outputs.items() if not any(part in name for part in _UNUSED)}
        if "bbox" in inputs:  # for layout models the boxes are part of the answer
            kept["bbox"] = inputs["bbox"]
        return type(outputs)({name: on_tensors(value, torch.Tensor.cpu) for name, value in kept.items()})

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs of each unit, with the size of its own picture."""
        rows = [outputs] if len(units) == 1 else super().split(outputs, units)
        for row, unit in zip(rows, units, strict=True):
            row[self.size_name] = unit.features.size
        return rows

    def finish(self, assembly: Assembly) -> Any:
        """The result of the pipeline's postprocessing, in the dtype of the outputs: half precision stays, as in transformers.

        NumPy knows no bfloat16, so postprocessing that uses NumPy (depth maps) gets float32.
        """
        try:
            return super().finish(assembly)
        except TypeError as error:
            if "BFloat16" not in str(error):
                raise
        assembly.outputs = {index: _floats(output) for index, output in assembly.outputs.items()}
        return super().finish(assembly)

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        picture = self._picture(decoded.value, arguments)
        assembly = Assembly(decoded.work, expected=1, context=arguments)
        alone = None if self._can_share(picture) else id(assembly)
        length = max(value.numel() for value in picture.tensors.values() if isinstance(value, torch.Tensor))
        return [Unit(assembly, 0, (arguments.forward_key, shape_key(picture.tensors), alone), length, picture)]

    def _picture(self, value: Any, arguments: Arguments) -> Picture:
        features = dict(self.copies.get().preprocess(value, **arguments.fresh().preprocess))
        size = features.pop(self.size_name)
        return Picture(features, size)

    def _can_share(self, picture: Picture) -> bool:
        """Whether every input has one row. Models that cut a picture into patches count pictures in other inputs."""
        return all(isinstance(value, torch.Tensor) and value.shape[:1] == (1,) for value in picture.tensors.values())


class DepthEstimator(SizedPictures):
    """depth-estimation."""

    def _picture(self, value: Any, arguments: Arguments) -> Picture:
        if min(value.size) < 2:
            # The pipeline mistakes a map of one row or column for a map with fewer dimensions, and fails.
            text = f"the picture has {value.width} x {value.height} pixels; depth needs two each way"
            raise ItemError("bad_input", text, STAGE)
        return super()._picture(value, arguments)


class KeypointMatcher(SizedPictures):
    """keypoint-matching: pairs of pictures. A pair is one row of the batch."""

    size_name = "target_sizes"

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """For each unit its outputs and the sizes of its pictures, in the form for the pipeline's postprocess."""
        rows = [outputs] if len(units) == 1 else Adapter.split(self, outputs, units)
        return [
            {"model_outputs": row, self.size_name: [unit.features.size]} for row, unit in zip(rows, units, strict=True)
        ]

    def _picture(self, value: Any, arguments: Arguments) -> Picture:
        found = self.copies.get().preprocess(value, **arguments.fresh().preprocess)
        return Picture(dict(found["model_inputs"]), found[self.size_name])

    def _can_share(self, picture: Picture) -> bool:
        return self.pipe.model.config.model_type in _MASKS_KEYPOINTS and super()._can_share(picture)


def on_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change` applied to every tensor, inside lists and tuples too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(on_tensors(one, change) for one in value)
    return value


def _as_float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _floats(output: Mapping[str, Any]) -> Any:
    """The outputs of one unit in float32, in the same class."""
    kind: Any = type(output)
    return kind({name: on_tensors(value, _as_float) for name, value in output.items()})
