"""Feature maps of a model's backbone: what `AutoBackbone` gives, without a second copy of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from pipefleet_workers.adapters.vision.features import ImageFeatures, backbone_of
from pipefleet_workers.items import ItemError
from tests.checkpoints.media import image
from tests.parity.harness import Call, assert_same, load, recording, running

TASK = "image-feature-extraction"
_SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "resnet": hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "swin": hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, drop_path_rate=0.0
    ),
    "dinov2": hf.Dinov2Config(**_SIZES, image_size=32, patch_size=8),
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        hf.AutoModel.from_config(CONFIGS[request.param]).eval().save_pretrained(place)
    size = {"height": 32, "width": 32}
    hf.ViTImageProcessorPil(size=size).save_pretrained(place)
    return place


def pipeline(folder: Path) -> Any:
    return hf.pipeline(TASK, model=str(folder), device="cpu", dtype=torch.float32)


def test_feature_maps_are_those_of_the_backbone_class(folder: Path) -> None:
    pipe = pipeline(folder)
    backbone = type(backbone_of(pipe.model))
    wanted = [[1, 2], [-1], [0], None, [2, 0]]
    calls = [
        Call(picture, {} if indices is None else {"out_indices": indices})
        for picture in (image(40, 30), image(64, 64, 2))
        for indices in wanted
    ]
    adapter = recording(ImageFeatures, pipe)
    with running(adapter, TASK) as engine:
        outcomes = engine.run_together(calls)
    for call, outcome in zip(calls, outcomes, strict=True):
        assert outcome.failure is None, outcome.failure
        pixels = pipe.image_processor(call.inputs, return_tensors="pt")
        indices = call.parameters.get("out_indices")
        if indices is None:
            assert_same(outcome.output, pipe(call.inputs))
            continue
        reference = backbone.from_pretrained(folder, out_indices=sorted(indices)).eval()
        with torch.no_grad():
            maps = dict(zip(sorted(indices), reference(**pixels).feature_maps, strict=True))
        assert len(outcome.output) == len(indices)
        assert all(isinstance(one, np.ndarray) and one.shape[0] == 1 for one in outcome.output)
        for index, found in zip(indices, outcome.output, strict=True):
            assert_same(found, maps[index])
    assert max(len(batch.units) for batch in adapter.batches) >= 8, "requests for other maps share a batch"


def test_the_backbone_shares_the_weights_of_the_model(folder: Path) -> None:
    model = pipeline(folder).model
    own = {one.data_ptr() for one in model.parameters()}
    strangers = [name for name, one in backbone_of(model).named_parameters() if one.data_ptr() not in own]
    assert all("norm" in name for name in strangers)
    assert len(strangers) < len(own) / 4


@pytest.mark.parametrize("asked", [[7], [-8], []])
def test_stages_that_are_not_there_are_refused(folder: Path, asked: list[int]) -> None:
    with running(recording(ImageFeatures, pipeline(folder)), TASK) as engine:
        outcomes = engine.run([Call(image(32, 32), {"out_indices": asked}), Call(image(32, 32))])
    assert outcomes[0].failure is not None
    assert outcomes[0].failure.code == "bad_parameter"
    assert "stages 0 to" in outcomes[0].failure.message
    assert outcomes[1].failure is None


def test_stages_may_be_asked_for_by_their_names(folder: Path) -> None:
    asked = [{"out_features": ["stem", "stage1"]}, {"out_indices": [0, 1]}, {"out_features": ["stage9"]}]
    with running(recording(ImageFeatures, pipeline(folder)), TASK) as engine:
        named, counted, unknown = engine.run([Call(image(32, 32), one) for one in asked])
    assert_same(named.output, counted.output)
    assert unknown.failure is not None
    assert "the model has the stages stem, stage1" in unknown.failure.message


def test_a_model_without_a_backbone_says_so() -> None:
    with running(recording(ImageFeatures, load(TASK)), TASK) as engine:
        (outcome,) = engine.run([Call(image(32, 32), {"out_indices": [1]})])
    assert outcome.failure is not None
    assert outcome.failure.code == "bad_parameter"
    assert "'vit'" in outcome.failure.message


def test_weights_of_another_model_are_not_taken_for_a_backbone() -> None:
    model = hf.AutoModel.from_config(CONFIGS["dinov2"])
    model.encoder = torch.nn.Identity()
    with pytest.raises(ItemError, match="no weights for encoder"):
        backbone_of(model)


def test_a_missing_pooler_fails_the_request_that_asked_for_it_alone() -> None:
    pipe = load(TASK)
    pipe.model.pooler = None
    with running(recording(ImageFeatures, pipe), TASK) as engine:
        pooled, plain = engine.run_together([Call(image(32, 32), {"pool": True}), Call(image(32, 32))])
    assert pooled.failure is not None
    assert pooled.failure.code == "bad_parameter"
    assert plain.failure is None


def test_a_setting_of_a_processor_that_it_refuses_is_named_with_its_reason() -> None:
    """The first line of the error only says that there is one; the reason stands on the next."""
    pipe = load(TASK)
    call = Call(image(32, 32), {"image_processor_kwargs": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}})
    with running(recording(ImageFeatures, pipe), TASK) as engine:
        (outcome,) = engine.run([call])
    assert outcome.failure is not None
    assert outcome.failure.code == "bad_input"
    assert "Field 'image_mean' with value [0, 0, 0]" in outcome.failure.message
