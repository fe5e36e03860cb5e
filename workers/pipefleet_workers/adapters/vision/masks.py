"""The adapter of mask-generation (SAM and its kin): a picture is encoded once, then asked about a grid of points in many units.

    prepare: picture ─▶ crops ─▶ points, in units      device: encode a crop once ─▶ masks for the points of each unit

The pipeline runs the vision encoder in its preprocess; here the device runs the encoder as well. The first batch with points of a
crop computes the crop's embedding, together with other crops that need one; later batches find it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipefleet_workers.adapters.arguments import Arguments
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.vision.boxes import mask_of, non_maximum_suppression
from pipefleet_workers.adapters.vision.sized import on_tensors
from pipefleet_workers.items import Assembly, Decoded, Unit

EMBEDDED_TOGETHER = 8
"""Crops that go through the vision encoder at once. An encoder of a thousand pixels a side holds gigabytes for each crop."""
RESIZED_PIXELS = 1 << 26
"""Pixels of masks that are resized to the picture's size at once; each takes four bytes, a few times over."""
_DEFAULTS = {
    "points_per_batch": 64,
    "crops_n_layers": 0,
    "crop_overlap_ratio": 512 / 1500,
    "points_per_crop": 32,
    "crop_n_points_downscale_factor": 1,
}
_FILTER_DEFAULTS = {
    "pred_iou_thresh": 0.88,
    "stability_score_thresh": 0.95,
    "mask_threshold": 0,
    "stability_score_offset": 1,
}


@dataclass(slots=True)
class Crop:
    """A part of a picture, or all of it. One thread at a time uses it after `prepare`.

    `pixels` are freed when `embeddings` exist.
    """

    pixels: torch.Tensor | None
    box: torch.Tensor
    size: list[int]
    reshaped: list[int] | None
    picture_size: list[int]
    embeddings: Any = None


@dataclass(frozen=True, slots=True)
class Points:
    """Some points of a crop: `[1, points, 1, 2]`, in pixels of the model's input."""

    crop: Crop
    points: torch.Tensor


class MaskGenerator(Adapter):
    """mask-generation. A unit has `points_per_batch` points of a crop; units of different pictures share batches."""

    typical_size = 0  # not measured at warm-up, since the cost counts points; the table's cost is used

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.parallel = False  # the units of a picture share its embeddings

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """The points, and for each point the label "inside"."""
        points = torch.cat([unit.features.points for unit in units])
        return {"input_points": points, "input_labels": torch.ones(points.shape[:3], dtype=torch.int64)}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """For each unit its kept masks as run lengths, with scores and boxes, on the host."""
        pipe = self.pipe
        with torch.no_grad():
            self._embed([unit.features.crop for unit in units], progress)
            embeddings = _joined([unit.features.crop.embeddings for unit in units])
            if isinstance(embeddings, tuple):  # SAM-HQ also needs the encoder's intermediate values
                inputs = {**inputs, "intermediate_embeddings": embeddings[1]}
                embeddings = embeddings[0]
            inputs = pipe._ensure_tensor_on_device(inputs, device=pipe.device)
            outputs = pipe.model(**inputs, image_embeddings=embeddings)
            return [
                self._filtered(outputs["pred_masks"][index], outputs["iou_scores"][index], unit, progress)
                for index, unit in enumerate(units)
            ]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The outputs themselves: `run` has taken them apart."""
        return list(outputs)

    def finish(self, assembly: Assembly) -> Any:
        """`{"masks": [array], "scores": tensor}`, best score first, without masks that repeat a better mask."""
        asked: Mapping[str, Any] = assembly.context.fresh().postprocess
        rows = [assembly.outputs[index] for index in range(assembly.expected)]
        runs = [one for row in rows for one in row["masks"]]
        scores, boxes = (torch.cat([row[name] for row in rows]) for name in ("scores", "boxes"))
        kept = non_maximum_suppression(
            boxes.float().numpy(), scores.float().numpy(), iou_threshold=asked.get("crops_nms_thresh", 0.7)
        )
        result = {"masks": [mask_of(runs[index]) for index in kept], "scores": scores[kept]}
        if asked.get("output_rle_mask"):
            result["rle_mask"] = [runs[index] for index in kept]
        if asked.get("output_bboxes_mask"):
            result["bounding_boxes"] = boxes[kept]
        return result

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        arguments = self.parse(decoded.work.parameters)
        asked = {**_DEFAULTS, **arguments.preprocess}
        pieces: list[Points] = []
        for crop, points in self._crops(decoded.value, asked):
            step = asked["points_per_batch"] or points.shape[1]
            pieces += [Points(crop, points[:, at : at + step]) for at in range(0, points.shape[1], step)]
        assembly = Assembly(decoded.work, expected=len(pieces), context=arguments)
        return [self._unit(assembly, index, piece) for index, piece in enumerate(pieces)]

    def _unit(self, assembly: Assembly, index: int, piece: Points) -> Unit:
        count = piece.points.shape[1]
        assert piece.crop.pixels is not None
        return Unit(assembly, index, (tuple(piece.crop.pixels.shape), count), count, piece)

    def _crops(self, image: Any, asked: Mapping[str, Any]) -> Iterator[tuple[Crop, torch.Tensor]]:
        """Each crop with its points."""
        pipe = self.copies.get()
        layers = [layer for layer in range(asked["crops_n_layers"] + 1) for _ in range(4**layer)]
        grids = {layer: self._grid(image, asked, layer) for layer in sorted(set(layers))}
        boxes, _, images = grids[0]
        inputs = pipe.image_processor(images=images, return_tensors="pt").to(pipe.dtype)
        sizes = inputs["original_sizes"].tolist()
        reshaped = inputs["reshaped_input_sizes"].tolist() if "reshaped_input_sizes" in inputs else [None] * len(images)
        for index, layer in enumerate(layers):
            pixels = inputs["pixel_values"][index : index + 1].clone()
            crop = Crop(pixels, boxes[index], sizes[index], reshaped[index], sizes[0])
            yield crop, grids[layer][1][:, :, index : index + 1]

    def _grid(self, image: Any, asked: Mapping[str, Any], layer: int) -> tuple[Any, Any, Any]:
        """Boxes, points and pictures of all crops, with the number of points of a crop of `layer`.

        Each number of points needs its own call: transformers cannot stack numbers that differ between layers.
        """
        processor = self.copies.get().image_processor
        side = max(1, asked["points_per_crop"] // asked["crop_n_points_downscale_factor"] ** layer)
        target = processor.size.get("longest_edge", processor.size.get("height"))
        boxes, points, images, _ = processor.generate_crop_boxes(
            image, target, asked["crops_n_layers"], asked["crop_overlap_ratio"], side, 1
        )
        return boxes, points, images

    def _embed(self, crops: Sequence[Crop], progress: Progress) -> None:
        """Give every crop its embeddings, several in one run of the encoder."""
        waiting = list({id(crop): crop for crop in crops if crop.embeddings is None}.values())
        for start in range(0, len(waiting), EMBEDDED_TOGETHER):
            group = waiting[start : start + EMBEDDED_TOGETHER]
            pixels = torch.cat([crop.pixels for crop in group if crop.pixels is not None]).to(self.pipe.device)
            found = self.pipe.model.get_image_embeddings(pixels)
            for index, crop in enumerate(group):
                crop.embeddings = _row(found, index)
                crop.pixels = None
            progress.tick()

    def _filtered(self, masks: torch.Tensor, scores: torch.Tensor, unit: Unit, progress: Progress) -> dict[str, Any]:
        """`masks` is `[points, masks of a point, height, width]`, `scores` `[points, masks of a point]`."""
        arguments: Arguments = self.arguments(unit)
        asked = {name: arguments.forward.get(name, default) for name, default in _FILTER_DEFAULTS.items()}
        chosen = scores > asked["pred_iou_thresh"] if asked["pred_iou_thresh"] > 0 else torch.ones_like(scores).bool()
        masks, scores, crop = masks[chosen][:, None], scores[chosen][:, None], unit.features.crop
        together = max(1, RESIZED_PIXELS // (crop.size[0] * crop.size[1]))
        runs: list[Any] = []
        kept, boxes = [scores.new_zeros(0).cpu()], [torch.zeros(0, 4, dtype=torch.int64)]
        for at in range(0, len(masks), together):
            found, good, around = self._full_size(masks[at : at + together], scores[at : at + together], crop, asked)
            runs += found
            kept.append(good.cpu())
            boxes.append(around.cpu())
        progress.tick()
        return {"masks": runs, "scores": torch.cat(kept), "boxes": torch.cat(boxes)}

    def _full_size(
        self, masks: torch.Tensor, scores: torch.Tensor, crop: Crop, asked: Mapping[str, Any]
    ) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
        processor = self.copies.get().image_processor
        (resized,) = processor.post_process_masks(
            masks[None],
            [crop.size],
            mask_threshold=asked["mask_threshold"],
            reshaped_input_sizes=None if crop.reshaped is None else [crop.reshaped],
            binarize=False,
        )
        runs, good, boxes = processor.filter_masks(resized, scores, crop.picture_size, crop.box, **asked)
        return runs, good, boxes


def _row(value: Any, index: int) -> Any:
    """One row of nested tensors, copied so that the other rows can be freed."""
    return on_tensors(value, lambda tensor: tensor[index : index + 1].clone())


def _joined(values: Sequence[Any]) -> Any:
    """Nested tensors of several crops, as rows of one."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return type(values[0])(_joined(column) for column in zip(*values, strict=True))
