"""Pictures that are preprocessed on the device: bit for bit what the processor and Pillow give, or else not at all."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipefleet.contract.messages import JobItem
from pipefleet_workers.adapters.base import Adapter
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.vision import on_device as device_images
from pipefleet_workers.adapters.vision.features import ImageFeatures
from pipefleet_workers.adapters.vision.on_device import LARGEST, DevicePictures, Pixels, Plan, on_device
from pipefleet_workers.adapters.vision.resample import FILTERS, MOST_TAPS, resize, vertical_first
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.transfer import Transfer
from pipefleet_workers.items import Decoded, JobContext, Unit, Work
from tests.parity.harness import Call, assert_same, load, running
from tests.unit.worker.engine.test_transfer import FakeLink

TASK = "image-classification"
SIZES = ((64, 48), (48, 64), (32, 32), (200, 90), (64, 48), (31, 70))
COMMON = {
    "vit": hf.ViTImageProcessorPil(size={"height": 24, "width": 32}),
    "clip": hf.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "deit": hf.DeiTImageProcessorPil(),
    "siglip": hf.SiglipImageProcessorPil(size={"height": 30, "width": 30}, resample=Image.Resampling.LANCZOS),
    "unscaled": hf.ViTImageProcessorPil(do_rescale=False, do_normalize=False),
    "unsized": hf.ViTImageProcessorPil(do_resize=False),
}
OTHERS = {
    "own resize": hf.ConvNextImageProcessorPil(),
    "own way": hf.EfficientNetImageProcessorPil(),
    "unknown filter": hf.ViTImageProcessorPil(resample=Image.Resampling.NEAREST),
}


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def units_of(adapter: Adapter, pictures: Sequence[Any], **parameters: Any) -> list[Unit]:
    job = JobContext("job", None, parameters, 3, None, Outcomes(range(len(pictures))))
    works = [Work(job, place, JobItem(str(place), None), parameters, 1) for place in range(len(pictures))]
    prepared = adapter.prepare([Decoded(work, one) for work, one in zip(works, pictures, strict=True)])
    return [unit for units in prepared if isinstance(units, list) for unit in units]


def served(adapter: Adapter, units: Sequence[Unit]) -> list[Any]:
    """The results of units that share a batch, whose inputs go the way of a GPU's."""
    assert len({unit.key for unit in units}) == 1
    transfer = Transfer(FakeLink())
    outputs = adapter.run(transfer.finish(transfer.begin(adapter.collate(units))), units, UNOBSERVED)
    for unit, output in zip(units, adapter.split(outputs, units), strict=True):
        unit.assembly.collect(unit.index, output)
    return [adapter.finish(unit.assembly) for unit in units]


@settings(max_examples=60, deadline=None)
@given(
    before=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    after=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    resample=st.sampled_from(sorted(FILTERS)),
)
def test_a_resize_is_pillows_to_the_last_level(before: tuple[int, int], after: tuple[int, int], resample: int) -> None:
    order = vertical_first(before, after, resample)
    assert order is not None
    picture = noise(*before)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    found = resize(pixels, after, resample, columns_first=order).permute(1, 2, 0).numpy()
    wanted = np.asarray(picture.resize((after[1], after[0]), Image.Resampling(resample)))
    assert np.array_equal(found, wanted)


def test_more_pixels_than_can_be_added_up_are_left_to_pillow() -> None:
    assert vertical_first((40, MOST_TAPS), (4, 1), int(Image.Resampling.BILINEAR)) is None


@pytest.mark.parametrize("name", sorted(COMMON))
def test_a_plan_gives_what_the_processor_gives(name: str) -> None:
    processor = COMMON[name]
    plan = Plan.of(processor)
    assert plan is not None
    for height, width in ((64, 48), (41, 333), (300, 280), (40, 40)):
        size = plan.output(height, width)
        assert size is not None
        raw = torch.from_numpy(np.array(noise(height, width)))
        wanted = processor(noise(height, width), return_tensors="pt")["pixel_values"]
        found = plan.apply([raw], torch.float32)
        assert tuple(found.shape[2:]) == size
        assert torch.equal(found, wanted.float())


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_processor_with_ways_of_its_own_stays_on_the_host(name: str, caplog: pytest.LogCaptureFixture) -> None:
    pipe = load(TASK)
    pipe.image_processor = OTHERS[name]
    adapter = Adapter(pipe)
    with caplog.at_level(logging.INFO):
        assert on_device(adapter) is adapter
    assert "on the host" in caplog.text


def test_a_plan_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipe = load(TASK)
    monkeypatch.setattr(device_images, "vertical_first", lambda *_: True)
    adapter = Adapter(pipe)
    with caplog.at_level(logging.INFO):
        assert on_device(adapter) is adapter
    assert "levels" in caplog.text


def test_pictures_of_all_sizes_share_a_batch_and_get_the_pipelines_results() -> None:
    pipe = load(TASK)
    adapter = on_device(Adapter(pipe))
    assert isinstance(adapter, DevicePictures)
    pictures = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    units = units_of(adapter, pictures)
    assert all(isinstance(unit.features["pixel_values"], Pixels) for unit in units)
    assert {unit.length for unit in units} == {unit.length for unit in units_of(Adapter(pipe), pictures)}
    assert_same(served(adapter, units), [pipe(picture) for picture in pictures])


def test_features_of_pictures_with_and_without_parameters_for_the_processor() -> None:
    pipe = load("image-feature-extraction")
    adapter = on_device(ImageFeatures(pipe))
    assert isinstance(adapter, DevicePictures)
    plain = units_of(adapter, [noise(50, 40)])
    own = units_of(adapter, [noise(50, 40)], image_processor_kwargs={"do_normalize": False})
    assert isinstance(plain[0].features["pixel_values"], Pixels)
    assert isinstance(own[0].features["pixel_values"], torch.Tensor)
    assert_same(served(adapter, plain)[0], pipe(noise(50, 40)))
    wanted = pipe(noise(50, 40), image_processor_kwargs={"do_normalize": False})
    assert_same(served(adapter, own)[0], wanted)


def test_a_large_picture_is_made_small_on_the_host() -> None:
    pipe = load(TASK)
    adapter = on_device(Adapter(pipe))
    large = noise(LARGEST // 1000 + 1, 1000)
    (unit,) = units_of(adapter, [large])
    assert isinstance(unit.features["pixel_values"], torch.Tensor)
    assert_same(served(adapter, [unit]), [pipe(large)])


def test_the_engine_serves_them() -> None:
    pipe = load(TASK)
    adapter: Any = on_device(Adapter(pipe))
    adapter.gate = threading.Event()
    pictures = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    with running(adapter, TASK) as engine:
        outcomes = engine.run([Call(one) for one in pictures])
    assert_same([one.output for one in outcomes], [pipe(picture) for picture in pictures])
