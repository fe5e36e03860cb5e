"""Preprocesses pictures on the device: the host decodes them and sends bytes, three for each pixel.

`models.acceleration` asks for it.

    decode ─▶ Pixels (host) ─▶ copied ahead, as they are ─▶ resize, crop, table of levels (device) ─▶ model

Only image processors of the common kind are supported: one size, centre crop, rescale, mean and deviation. Before any job, made-up
pictures of many sizes prove that the device gives the processor's results. If it does not, the host goes on preprocessing.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_transforms import get_resize_output_image_size

from pipefleet_workers.adapters.base import Adapter, PipelineCopies, brief
from pipefleet_workers.adapters.progress import Progress
from pipefleet_workers.adapters.vision.features import ImageFeatures
from pipefleet_workers.adapters.vision.resample import FILTERS, resize, vertical_first
from pipefleet_workers.items import Decoded, Unit

log = logging.getLogger(__name__)

LARGEST = 1 << 21
"""Most pixels of a picture that waits at its full size. The host preprocesses larger pictures; hundreds would fill its memory."""
AT_ONCE = 1 << 23
"""Pixels that are resized together; they are float32 meanwhile."""
PROVED = (
    (64, 48),
    (48, 64),
    (300, 200),
    (200, 300),
    (37, 500),
    (640, 480),
    (225, 224),
    (480, 853),
    (30, 31),
    (999, 333),
)
"""Height and width of the pictures of the proof: smaller and larger than models take, and of odd shapes."""
_PIXELS = "pixel_values"
_OWN_WAYS = (
    "_preprocess",
    "_preprocess_image_like_inputs",
    "process_image",
    "resize",
    "center_crop",
    "rescale",
    "normalize",
)


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded picture, uint8 `[height, width, 3]`, and the height and width that the model gets.

    Its `repr` is part of the batch key (`shape_key`), so it names only the model's size: pictures of any sizes may share a batch.
    """

    raw: torch.Tensor
    size: tuple[int, int]

    def __repr__(self) -> str:
        return f"pixels for {self.size}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of an image processor, read from its attributes.

    `table` `[3, 256]` holds the result for each level of each channel.
    """

    size: Any
    resample: int
    crop: tuple[int, int] | None
    table: torch.Tensor

    @classmethod
    def of(cls, processor: Any) -> Plan | None:
        """The plan of a processor of the common kind; None for any other processor."""
        if not _is_common(processor):
            return None
        levels = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (1, 1, 3))
        switched_off = {"do_resize": False, "do_center_crop": False}
        table = processor(images=Image.fromarray(levels), return_tensors="pt", **switched_off)[_PIXELS]
        crop = processor.crop_size if processor.do_center_crop else None
        return cls(
            processor.size if processor.do_resize else None,
            int(processor.resample if processor.resample is not None else Image.Resampling.BILINEAR),
            None if crop is None else (int(crop["height"]), int(crop["width"])),
            table.reshape(3, 256).float(),
        )

    def output(self, height: int, width: int) -> tuple[int, int] | None:
        """The size of a picture at the model; None if only the processor can tell."""
        resized = self.resized(height, width)
        if resized is None or vertical_first((height, width), resized, self.resample) is None:
            return None
        if self.crop is None:
            return resized
        fits = self.crop[0] <= resized[0] and self.crop[1] <= resized[1]
        return self.crop if fits else None  # the processor adds a margin to a smaller picture

    def resized(self, height: int, width: int) -> tuple[int, int] | None:
        """Height and width after the resize; None for uncommon rules."""
        if self.size is None:
            return height, width
        wanted = {name: value for name, value in dict(self.size).items() if value is not None}
        if set(wanted) == {"height", "width"}:
            return int(wanted["height"]), int(wanted["width"])
        if set(wanted) != {"shortest_edge"}:
            return None
        shape = np.broadcast_to(np.uint8(0), (3, height, width))
        found = get_resize_output_image_size(shape, wanted["shortest_edge"], False, input_data_format="channels_first")
        return int(found[0]), int(found[1])

    def apply(self, pictures: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The model's `pixel_values` for pictures with one `output` size, on the pictures' device, in their order."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, one in enumerate(pictures):
            groups[(one.shape[0], one.shape[1])].append(index)
        found: dict[int, torch.Tensor] = {}
        for (height, width), indices in groups.items():
            step = max(1, AT_ONCE // (height * width))
            for start in range(0, len(indices), step):
                piece = indices[start : start + step]
                found.update(zip(piece, self._levels(torch.stack([pictures[i] for i in piece])), strict=True))
        levels = torch.stack([found[index] for index in range(len(pictures))])
        table = self.table.to(levels.device, dtype)
        return torch.stack([table[channel][levels[:, channel]] for channel in range(3)], dim=1)

    def _levels(self, pictures: torch.Tensor) -> torch.Tensor:
        """`[n, 3, height, width]` of levels after resize and crop."""
        before = (pictures.shape[1], pictures.shape[2])
        after = self.resized(*before)
        assert after is not None
        order = bool(vertical_first(before, after, self.resample))
        pixels = resize(pictures.permute(0, 3, 1, 2).float(), after, self.resample, columns_first=order)
        if self.crop is not None:
            top, left = ((whole - part) // 2 for whole, part in zip(after, self.crop, strict=True))
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        return pixels.long()


def _is_common(processor: Any) -> bool:
    """Whether a processor uses its backend's methods, in RGB, with a known filter, and adds no margins."""
    backend = next((one for one in (PilBackend, TorchvisionBackend) if isinstance(processor, one)), None)
    if backend is None or any(getattr(type(processor), name) is not getattr(backend, name) for name in _OWN_WAYS):
        return False
    resample = Image.Resampling.BILINEAR if processor.resample is None else processor.resample
    return isinstance(resample, int) and int(resample) in FILTERS and not getattr(processor, "do_pad", None)


class HostProcessor:
    """Stands in for an image processor in the pipeline's preprocess: pictures that the plan covers become Pixels."""

    def __init__(self, processor: Any, plan: Plan) -> None:
        self.processor = processor
        self.plan = plan

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("processor", "plan"):  # an unfinished copy asks for these
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, images: Any, return_tensors: str | None = None, **keywords: Any) -> Any:
        """The pixels of one picture; for any other input the processor's own result."""
        size = None
        if not keywords and isinstance(images, Image.Image) and images.mode == "RGB":
            size = self.plan.output(images.height, images.width) if images.height * images.width <= LARGEST else None
        if size is None:
            return self.processor(images, return_tensors=return_tensors, **keywords)
        return BatchFeature({_PIXELS: Pixels(torch.from_numpy(np.array(images)), size)})


class DevicePictures(Adapter):
    """An adapter whose pictures are preprocessed where its model is."""

    def __init__(self, pipe: Any, plan: Plan) -> None:
        super().__init__(pipe)
        host = copy.copy(pipe)
        host.image_processor = HostProcessor(pipe.image_processor, plan)
        self.plan, self.copies = plan, PipelineCopies(host)

    def collate(self, units: Sequence[Unit]) -> dict[str, Any]:
        """A list of pictures of any sizes; stacked tensors if the host has preprocessed them."""
        if not isinstance(units[0].features.get(_PIXELS), Pixels):
            return super().collate(units)
        return {_PIXELS: [unit.features[_PIXELS].raw for unit in units]}

    def run(self, inputs: dict[str, Any], units: Sequence[Unit], progress: Progress) -> Any:
        """The adapter's own outputs for the preprocessed pictures."""
        pictures = inputs[_PIXELS]
        if isinstance(pictures, list):
            with torch.no_grad():
                there = [one.to(self.pipe.device) for one in pictures]
                inputs = {**inputs, _PIXELS: self.plan.apply(there, self.pipe.dtype)}
        return super().run(inputs, units, progress)

    def _prepare(self, decoded: Decoded) -> list[Unit]:
        units = super()._prepare(decoded)
        for unit in units:
            pixels = unit.features.get(_PIXELS)
            if isinstance(pixels, Pixels):
                unit.length = 3 * pixels.size[0] * pixels.size[1]
        return units


class DeviceImageFeatures(DevicePictures, ImageFeatures):
    """`ImageFeatures` on the device."""


SERVED: Mapping[type[Adapter], Callable[[Any, Plan], Adapter]] = {
    Adapter: DevicePictures,
    ImageFeatures: DeviceImageFeatures,
}
"""The adapter that replaces each supported adapter. Supported adapters use nothing of a processor but the model's inputs."""


def on_device(adapter: Adapter) -> Adapter:
    """An adapter that preprocesses its pictures on its device, or `adapter` itself if that would change a result.

    Never raises; logs its choice and the reason.
    """
    processor = getattr(adapter.pipe, "image_processor", None)
    served = SERVED.get(type(adapter))
    if served is None or processor is None:
        return adapter
    try:
        plan = Plan.of(processor)
        reason = "its image processor has ways of its own" if plan is None else _difference(plan, adapter.pipe)
    except Exception as error:  # noqa: BLE001 - whatever a processor raises, the host can still preprocess
        plan, reason = None, brief(error)
    if plan is None or reason:
        log.info("pictures are preprocessed on the host: %s", reason)
        return adapter
    log.info("pictures are preprocessed on %s, which gives what the image processor gives", adapter.pipe.device)
    return served(adapter.pipe, plan)


def _difference(plan: Plan, pipe: Any) -> str:
    """Why a plan differs from the pipeline's processor; empty if it does not.

    Results of Pillow must be equal. torchvision itself differs from Pillow by a level here and there, so the same is allowed here.
    """
    allowed = 0.0 if isinstance(pipe.image_processor, PilBackend) else 1.001 * _level(plan)
    source = np.random.default_rng(0)
    for size in PROVED:
        if plan.output(*size) is None:
            continue
        noise = source.integers(0, 256, (*size, 3), dtype=np.uint8)
        wanted = pipe.image_processor(Image.fromarray(noise), return_tensors="pt")[_PIXELS].float()
        found = plan.apply([torch.from_numpy(noise).to(pipe.device)], torch.float32).cpu()
        if found.shape != wanted.shape:
            return f"a picture of {size} becomes {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        difference = float((found - wanted).abs().max())
        if difference > allowed:
            return f"a picture of {size} differs by {difference / _level(plan):.1f} levels"
    return ""


def _level(plan: Plan) -> float:
    """The largest step between neighbouring levels of a channel."""
    return float(plan.table.diff(dim=1).abs().max())
