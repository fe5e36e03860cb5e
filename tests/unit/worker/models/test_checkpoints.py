"""The tiny checkpoints that other tests run on: complete, repeatable, and cached without races."""

import io
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoints import CHECKPOINTS, build, write
from tests.checkpoints.cache import CACHE_VARIABLE, same_files
from tests.checkpoints.media import audio, encode, frames, image, mp4_bytes
from tests.checkpoints.registry import checkpoint

REPOSITORY = Path(__file__).parents[4]

TASKS = {
    "any-to-any",
    "audio-classification",
    "automatic-speech-recognition",
    "decision",
    "depth-estimation",
    "document-question-answering",
    "feature-extraction",
    "fill-mask",
    "image-classification",
    "image-feature-extraction",
    "image-segmentation",
    "image-text-to-text",
    "image-to-image",
    "image-to-text",
    "keypoint-matching",
    "mask-generation",
    "object-detection",
    "question-answering",
    "summarization",
    "table-question-answering",
    "text-classification",
    "text-generation",
    "text-to-audio",
    "text2text-generation",
    "token-classification",
    "translation",
    "translation_xx_to_yy",
    "video-classification",
    "visual-question-answering",
    "zero-shot-audio-classification",
    "zero-shot-classification",
    "zero-shot-image-classification",
    "zero-shot-object-detection",
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    return cache


def test_every_task_has_a_checkpoint_of_its_own_name() -> None:
    assert len(TASKS) == 33
    assert {row.task for row in CHECKPOINTS.values()} == TASKS
    assert set(CHECKPOINTS) >= TASKS


def test_a_key_is_its_task_with_an_optional_variant() -> None:
    for key, row in CHECKPOINTS.items():
        assert row.key == key
        assert key.partition(":")[0] == row.task
        assert not key.endswith(":")


@pytest.mark.parametrize(
    "key", ["feature-extraction", "automatic-speech-recognition:ctc-masked", "image-classification"]
)
def test_two_builds_have_the_same_bytes(key: str, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        write(key, folder)
        torch.rand(1)  # a build that leaned on the state it finds would now differ
    files = {file.name for file in folders[0].iterdir()}
    assert {"config.json", "model.safetensors"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    assert same_files(*folders)


def test_a_build_leaves_the_random_states_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = _draw_and_rewind()
    write("image-classification:convbn", tmp_path)
    assert _draw_and_rewind() == before


def _draw_and_rewind() -> tuple[float, float, float]:
    tensors, arrays, python = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = (torch.rand(1).item(), np.random.random(), random.random())
    torch.set_rng_state(tensors)
    np.random.set_state(arrays)
    random.setstate(python)
    return drawn


def test_processes_that_build_at_once_share_one_whole_checkpoint(tmp_path: Path, empty_cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.checkpoints import build; "
        "build('feature-extraction', Path(sys.argv[1]))"
    )
    shared = tmp_path / "shared"

    def run(_: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", code, str(shared)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, range(2)):
            assert done.returncode == 0, done.stderr
    (version,) = empty_cache.iterdir()
    assert [folder.name for folder in version.iterdir()] == ["feature-extraction"]
    here = tmp_path / "here"
    here.mkdir()
    write("feature-extraction", here)
    assert same_files(shared, here)


def test_a_build_that_fails_leaves_nothing_behind(
    tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise RuntimeError("half way")

    broken = replace(CHECKPOINTS["fill-mask"], build=break_off)
    monkeypatch.setitem(CHECKPOINTS, "fill-mask", broken)
    with pytest.raises(RuntimeError, match="half way"):
        build("fill-mask", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (version,) = empty_cache.iterdir()
    assert not list(version.iterdir())


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="pass an empty folder"):
        build("image-classification:convbn", taken)
    assert [file.name for file in taken.iterdir()] == ["notes.txt"]


def test_a_build_is_a_copy_that_the_caller_may_change(tmp_path: Path) -> None:
    first = build("image-classification:convbn", tmp_path / "first")
    (first / "config.json").write_text("{}")
    second = build("image-classification:convbn", tmp_path / "second")
    assert (second / "config.json").read_text() != "{}"


def test_an_unknown_key_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="text-classification"):
        build("text-clasification", tmp_path / "model")


def test_a_key_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        checkpoint("fill-mask", inputs=lambda _: [])(lambda _: None)


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_inputs_are_several_and_new_on_every_call(key: str, tmp_path: Path) -> None:
    row = CHECKPOINTS[key]
    first, second = row.inputs(tmp_path), row.inputs(tmp_path)
    assert 4 <= len(first) == len(second) <= 6
    assert all(a is not b or isinstance(a, str) for a, b in zip(first, second, strict=True))


def test_parameters_are_a_copy_for_every_reader() -> None:
    row = CHECKPOINTS["image-text-to-text"]
    row.parameters["generate_kwargs"].clear()
    assert row.parameters["generate_kwargs"]["max_new_tokens"] == 8


def test_encoded_media_decode_to_what_they_were() -> None:
    import soundfile
    from PIL import Image

    picture, wave = image(33, 50, 4), audio(0.6, "chirp")
    assert Image.open(io.BytesIO(encode(picture)[1])).tobytes() == picture.tobytes()
    decoded, rate = soundfile.read(io.BytesIO(encode(wave)[1]), dtype="float32")
    assert rate == 16000
    np.testing.assert_allclose(decoded, wave, atol=2**-15)


def test_an_mp4_has_the_frames_that_went_in() -> None:
    import av

    with av.open(io.BytesIO(mp4_bytes(frames(12, 64, 48))), "r") as container:
        sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
    assert sizes == [(64, 48)] * 12
