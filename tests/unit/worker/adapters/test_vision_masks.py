"""mask-generation: a picture is embedded once, by the device's thread; other models of the family; failures of a batch."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.vision import masks as module
from pipefleet_workers.adapters.vision.masks import MaskGenerator
from pipefleet_workers.items import ItemError
from pipefleet_workers.models.warmup import example_units
from tests.checkpoints.media import image
from tests.checkpoints.vision import _SAM_MASKS, _SAM_PROMPTS, _SAM_VISION
from tests.parity.cases.vision import masks
from tests.parity.harness import Call, assert_same, load, recording, running

TASK = "mask-generation"
ASKED: dict[str, Any] = {
    "points_per_crop": 4,
    "points_per_batch": 6,
    "pred_iou_thresh": -10.0,
    "stability_score_thresh": -1.0,
    "mask_threshold": 0.03,
}


class Encoder:
    """Counts the runs of a model's vision encoder: pictures of each, and the threads they were on."""

    def __init__(self, model: Any) -> None:
        self.pictures: list[int] = []
        self.threads: set[str] = set()
        self.failures = 0
        self._embed = model.get_image_embeddings
        model.get_image_embeddings = self

    def __call__(self, pixels: torch.Tensor) -> Any:
        self.threads.add(threading.current_thread().name)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("not now")
        self.pictures.append(len(pixels))
        return self._embed(pixels)


@pytest.fixture
def pipe() -> Any:
    return load(TASK)


def test_pictures_are_embedded_together_once_each_and_by_the_device(pipe: Any) -> None:
    encoder, calls = Encoder(pipe.model), [Call(image(64, 48, kind), ASKED) for kind in range(4)]
    adapter = recording(MaskGenerator, pipe)
    with running(adapter, TASK) as engine:
        outcomes = engine.run_together(calls)
    assert all(one.failure is None for one in outcomes)
    assert encoder.threads == {"device"}
    assert sum(encoder.pictures) == 1 + len(calls), "the first call came once more, to hold the device back"
    assert max(encoder.pictures) > 1


def test_many_crops_go_through_the_encoder_in_parts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EMBEDDED_TOGETHER", 2)
    encoder, asked = Encoder(pipe.model), {**ASKED, "crops_n_layers": 1}
    with running(recording(MaskGenerator, pipe), TASK) as engine:
        (outcome,) = engine.run([Call(image(64, 48), asked)])
    assert sum(encoder.pictures) == 5
    assert max(encoder.pictures) == 2
    monkeypatch.undo()
    assert_same(outcome.output, masks(load(TASK), Call(image(64, 48), asked)))


def test_masks_are_resized_in_parts(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(image(64, 48), ASKED)
    wanted = masks(load(TASK), call)
    monkeypatch.setattr(module, "RESIZED_PIXELS", 5 * 64 * 48)
    with running(recording(MaskGenerator, pipe), TASK) as engine:
        assert_same(engine.run([call])[0].output, wanted)


def test_a_batch_that_fails_is_run_again_unit_by_unit(pipe: Any) -> None:
    encoder, call = Encoder(pipe.model), Call(image(64, 48), ASKED)
    with running(recording(MaskGenerator, pipe), TASK) as engine:
        engine.run([call])
        encoder.failures = 1
        first, second = engine.run([call, Call(image(64, 48, 1), ASKED)])
    assert first.failure is None
    assert second.failure is None
    assert_same(first.output, masks(load(TASK), call))


def test_embeddings_go_with_the_units(pipe: Any) -> None:
    adapter = MaskGenerator(pipe)
    units = example_units(adapter, TASKS[TASK], ASKED, 8)
    crop = units[0].features.crop
    assert all(unit.features.crop is crop for unit in units)
    assert crop.embeddings is None, "nothing runs on the device before its batch"
    adapter.split(adapter.run(adapter.collate(units[:1]), units[:1], UNOBSERVED), units[:1])
    assert crop.pixels is None
    kept = weakref.ref(crop.embeddings)
    del units, crop
    gc.collect()
    assert kept() is None


def test_layers_of_crops_have_fewer_points_each(pipe: Any) -> None:
    """transformers cannot do it (its array of points is ragged), so each layer is compared with the points it has alone."""
    adapter = MaskGenerator(pipe)
    asked = {**ASKED, "points_per_batch": 64, "crops_n_layers": 2, "crop_n_points_downscale_factor": 2}
    units = example_units(adapter, TASKS[TASK], asked, 20)
    assert [unit.features.points.shape[1] for unit in units] == [16] + [4] * 4 + [1] * 16
    for side, part in ((4, slice(0, 1)), (2, slice(1, 5)), (1, slice(5, 21))):
        alone = {**asked, "points_per_crop": side, "crop_n_points_downscale_factor": 1}
        others = example_units(adapter, TASKS[TASK], alone, 20)[part]
        for mine, other in zip(units[part], others, strict=True):
            assert torch.equal(mine.features.points, other.features.points)
            assert torch.equal(mine.features.crop.box, other.features.crop.box)
            assert torch.equal(mine.features.crop.pixels, other.features.crop.pixels)


def test_filters_and_suppression_both_take_masks_away(pipe: Any) -> None:
    """Else the parity cases would show nothing."""
    call = Call(image(96, 48, 1), ASKED)
    everything = masks(pipe, Call(call.inputs, {**ASKED, "crops_nms_thresh": 1.0}))
    fewer = masks(pipe, call)
    sure = masks(pipe, Call(call.inputs, {**ASKED, "pred_iou_thresh": float(np.percentile(everything["scores"], 80))}))
    assert 0 < len(fewer["masks"]) < len(everything["masks"])
    assert 0 < len(sure["masks"]) < len(fewer["masks"])


def test_sam_hq(tmp_path: Path) -> None:
    """Its encoder also gives what it had in between."""
    config = hf.SamHQConfig(
        vision_config=_SAM_VISION,
        prompt_encoder_config=_SAM_PROMPTS,
        mask_decoder_config={**_SAM_MASKS, "vit_dim": _SAM_VISION["hidden_size"]},
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        hf.SamHQModel(config).eval().save_pretrained(tmp_path)
    load(TASK).image_processor.save_pretrained(tmp_path)
    pipe = hf.pipeline(TASK, model=str(tmp_path), device="cpu", dtype=torch.float32)
    calls = [Call(image(64, 48, kind), ASKED) for kind in range(3)]
    wanted = [masks(pipe, call) for call in calls]
    adapter = recording(MaskGenerator, pipe)
    with running(adapter, TASK) as engine:
        for outcome, result in zip(engine.run_together(calls), wanted, strict=True):
            assert outcome.failure is None, outcome.failure
            assert_same(outcome.output, result)
    assert max(len(batch.units) for batch in adapter.batches) > 3


def test_a_picture_that_cannot_be_cut_is_its_own_failure(pipe: Any) -> None:
    with pytest.raises(ItemError) as caught:
        example_units(MaskGenerator(pipe), TASKS[TASK], {**ASKED, "points_per_batch": "many"}, 8)
    assert caught.value.failure.code == "bad_input"
