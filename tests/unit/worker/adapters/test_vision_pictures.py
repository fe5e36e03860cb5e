"""Detection, segmentation, depth, key points and clips: what may share a batch, and what leaves the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video

from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.progress import UNOBSERVED
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.adapters.vision.sized import KeypointMatcher, Picture, SizedPictures
from pipefleet_workers.adapters.vision.video import VideoClassifier
from pipefleet_workers.items import Decoded, Unit
from pipefleet_workers.models.warmup import example_units, warm_up
from pipefleet_workers.observe.service_fit import ServiceFit
from tests.checkpoints import inputs
from tests.checkpoints.media import frames, image, mp4_bytes
from tests.parity.harness import Call, assert_same, load, recording, running

VISION = [
    "depth-estimation",
    "image-feature-extraction",
    "image-segmentation",
    "image-to-image",
    "keypoint-matching",
    "mask-generation",
    "object-detection",
    "video-classification",
]


@pytest.mark.parametrize("task", VISION)
def test_the_warm_up_runs_without_a_complaint(task: str, caplog: pytest.LogCaptureFixture) -> None:
    adapter, row = RUNTIME[task].adapter(load(task)), RUNTIME[task]
    found = warm_up(adapter, TASKS[task], dict(row.example_parameters), ServiceFit(), 4096)
    assert found.max_cost > 0
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("checkpoint", ["object-detection", "image-segmentation:panoptic", "depth-estimation:dynamic"])
def test_hidden_states_stay_on_the_device(checkpoint: str) -> None:
    task = checkpoint.partition(":")[0]
    pipe = load(checkpoint)
    pipe.model.config.output_hidden_states = True
    adapter = SizedPictures(pipe)
    units = example_units(adapter, TASKS[task], {}, 8)
    outputs = adapter.run(adapter.collate(units), units, UNOBSERVED)
    assert outputs
    assert not [name for name in outputs if "hidden_state" in name or "attention" in name]
    assert all(value.dtype == torch.float32 for value in outputs.values() if isinstance(value, torch.Tensor))


def test_a_picture_in_several_rows_goes_alone() -> None:
    """EoMT cuts a picture into patches and counts them by picture."""
    adapter = SizedPictures(load("image-segmentation"))
    row = torch.zeros(1, 3, 8, 8)
    assert adapter._can_share(Picture({"pixel_values": row}, (8, 8)))
    assert not adapter._can_share(Picture({"pixel_values": torch.cat([row, row])}, (8, 8)))
    assert not adapter._can_share(Picture({"pixel_values": row, "patch_offsets": [(0, 0, 8)]}, (8, 8)))


def test_eomt_in_patches(tmp_path: Path) -> None:
    config = hf.EomtConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_blocks=1,
        num_queries=5,
        num_upscale_blocks=1,
        id2label={0: "wall", 1: "floor", 2: "sky"},
        label2id={"wall": 0, "floor": 1, "sky": 2},
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        hf.EomtForUniversalSegmentation(config).eval().save_pretrained(tmp_path)
    size = {"shortest_edge": 32, "longest_edge": None}
    hf.EomtImageProcessorPil(size=size, do_split_image=True, do_pad=False).save_pretrained(tmp_path)
    pipe = hf.pipeline("image-segmentation", model=str(tmp_path), device="cpu", dtype=torch.float32)
    calls = [Call(image(96, 40, kind), {"subtask": "semantic"}) for kind in range(3)]
    wanted = [pipe(call.inputs, **call.parameters) for call in calls]
    with running(recording(SizedPictures, pipe), "image-segmentation") as engine:
        for outcome, result in zip(engine.run_together(calls), wanted, strict=True):
            assert outcome.failure is None, outcome.failure
            assert_same(outcome.output, result)


def test_key_points_of_models_that_were_not_proved_go_alone() -> None:
    pipe = load("keypoint-matching")
    together, alone = KeypointMatcher(pipe), KeypointMatcher(pipe)
    spec = TASKS["keypoint-matching"]
    first, second = (example_units(together, spec, {}, 8)[0] for _ in range(2))
    assert first.key == second.key
    pipe.model.config.model_type = "lightglue"
    first, second = (example_units(alone, spec, {}, 8)[0] for _ in range(2))
    assert first.key != second.key


def clip_of(count: int, folder: Path) -> Path:
    file = folder / f"{count}.mp4"
    file.write_bytes(mp4_bytes(frames(count)))
    return file


def test_frames_are_taken_apart_as_the_pipeline_takes_them(tmp_path: Path) -> None:
    pipe, file = load("video-classification"), clip_of(40, tmp_path)
    calls = [Call(file, {"frame_sampling_rate": rate, "top_k": 4}) for rate in (1, 2, 5)]
    with running(recording(VideoClassifier, pipe), "video-classification") as engine:
        outcomes = engine.run_together(calls)
    results = [pipe(str(file), **call.parameters) for call in calls]
    assert_same([one.output for one in outcomes], results)
    assert results[0] != results[1] != results[2]


def test_a_clip_that_is_too_short_says_so(tmp_path: Path) -> None:
    calls = [Call(clip_of(5, tmp_path)), Call(clip_of(8, tmp_path)), Call(clip_of(8, tmp_path), {"num_frames": 9})]
    with running(recording(VideoClassifier, load("video-classification")), "video-classification") as engine:
        short, enough, asked = engine.run(calls)
    assert enough.failure is None
    for one in (short, asked):
        assert one.failure is not None
        assert one.failure.code == "too_short"
        assert "num_frames" in one.failure.message


class VideoProcessor:
    """As the video processors of transformers, which need torchvision; here it makes pictures as `images` does."""

    fps = None

    def __init__(self, images: Any) -> None:
        self.images = images

    def sample_frames(self, metadata: VideoMetadata, **asked: Any) -> Any:
        return default_sample_indices_fn(metadata, **asked)

    def __call__(self, video: Any, *, do_sample_frames: bool, return_tensors: str, **asked: Any) -> Any:
        if do_sample_frames:  # as transformers' pipeline calls it, with a path
            video, _ = load_video(video, sample_indices_fn=lambda metadata, **_: self.sample_frames(metadata, **asked))
        return self.images(list(video), return_tensors=return_tensors)


@pytest.mark.parametrize("alone", [True, False])
def test_a_video_processor_spreads_the_frames_over_the_clip(tmp_path: Path, alone: bool) -> None:
    """Also where the model has an image processor beside it. It must open no file."""
    pipe, file = load("video-classification"), clip_of(40, tmp_path)
    first = pipe(str(file))
    pipe.video_processor = VideoProcessor(pipe.image_processor)
    pipe.image_processor = None if alone else pipe.image_processor
    wanted = pipe(str(file))
    calls = [Call(file), Call(clip_of(5, tmp_path)), Call(file, {"frame_sampling_rate": 3})]
    with running(recording(VideoClassifier, pipe), "video-classification") as engine:
        spread, short, further = engine.run(calls)
    assert spread.failure is None, spread.failure
    assert_same(spread.output, wanted)
    assert_same(further.output, wanted)
    assert first != wanted
    assert short.failure is not None
    assert (short.failure.code, "exceeds total_num_frames=5" in short.failure.message) == ("too_short", True)


def test_boxes_are_in_the_pixels_of_their_own_picture(tmp_path: Path) -> None:
    """Pictures of other sizes share a batch where the processor makes them one size."""
    pipe = load("object-detection:fixed")
    calls = [Call(one, {"threshold": 0.05}) for one in inputs.images(tmp_path)]
    wanted = [pipe(call.inputs, **call.parameters) for call in calls]
    assert all(wanted), "the checkpoint finds nothing: the test shows nothing"
    adapter = recording(SizedPictures, pipe)
    with running(adapter, "object-detection") as engine:
        assert_same([one.output for one in engine.run_together(calls)], wanted)
    sizes = [{unit.features.size.numpy().tobytes() for unit in batch.units} for batch in adapter.batches]
    assert max(map(len, sizes)) > 1


def test_a_panic_in_preprocessing_fails_its_item_alone() -> None:
    """Extensions in Rust panic with what is no Exception."""

    class Panicking(SizedPictures):
        def _prepare(self, decoded: Decoded) -> list[Unit]:
            if decoded.work.position == 1:
                raise BaseException("panicked")
            return super()._prepare(decoded)

    pipe = load("depth-estimation")
    with running(recording(Panicking, pipe), "depth-estimation") as one:
        outcomes = one.run([Call(image(40, 30, 1))] * 3)
    assert [one.failure.code if one.failure else "" for one in outcomes] == ["", "bad_input", ""]
