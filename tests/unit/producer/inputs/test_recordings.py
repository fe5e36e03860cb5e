"""Values that people pass as recordings: samples of any library and shape, their rates, strides and further keys, open files."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from pipefleet.contract.references import StorageRef
from pipefleet.errors import InputError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.recordings import recording_of
from pipefleet.pipelines.calls import is_dataset
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS
from pipefleet_workers.adapters.audio.speech import SpeechRecogniser
from tests.checkpoints.media import audio
from tests.parity.harness import Call, assert_same, load, recording, running

SPEECH, CLASSIFY, PICTURES = "automatic-speech-recognition", "audio-classification", "image-classification"
WAVE = np.sin(np.arange(800) / 10).astype("f4")


@pytest.fixture
def prepare(store: ObjectStore, prefix: str) -> Any:
    def prepared(task: str, value: Any, inline_bytes: int = 10_000) -> Any:
        preparer = InputPreparer(TASKS[task], store, prefix, inline_bytes=inline_bytes)
        return preparer.spill(preparer.prepare(value))

    return prepared


def heard(value: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(recording_of(value, extras=True).samples, "<f4")


SAMPLES: list[tuple[Any, np.ndarray[Any, Any]]] = [
    (WAVE[None], WAVE),
    (np.stack([WAVE, 0 * WAVE]), WAVE / 2),
    (WAVE.astype("f8"), WAVE),
    (WAVE.astype("f2"), WAVE.astype("f2").astype("f4")),
    (WAVE.astype(">f4"), WAVE),
    ((WAVE * 9000).astype("i2"), (WAVE * 9000).astype("i2").astype("f4")),
    ((WAVE * 9000).astype("i4"), (WAVE * 9000).astype("i4").astype("f4")),
    (np.stack([np.full(9, 3, "i2"), np.full(9, 4, "i2")]), np.full(9, 3.5)),
    (np.ma.masked_array(WAVE, WAVE > 0.5), WAVE),
    (WAVE[::2], WAVE[::2]),
    (torch.tensor(WAVE), WAVE),
    (torch.tensor(WAVE, requires_grad=True)[None], WAVE),
    (torch.tensor(WAVE).bfloat16(), torch.tensor(WAVE).bfloat16().float().numpy()),
    (WAVE.tolist(), WAVE),
    ([WAVE.tolist(), (0 * WAVE).tolist()], WAVE / 2),
    ([WAVE, 0 * WAVE], WAVE / 2),
    (list(WAVE), WAVE),
]


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_samples_of_any_kind_are_heard_as_transformers_hears_them(index: int) -> None:
    value, wanted = SAMPLES[index]
    assert np.array_equal(heard(value), wanted.astype("f4"))
    assert np.array_equal(heard({"array": value, "sampling_rate": 8000, "path": None}), wanted.astype("f4"))


RATES = [8000, 8000.0, np.int64(8000), np.uint16(8000), np.float64(8000), np.array(8000), torch.tensor(8000)]


@pytest.mark.parametrize("rate", RATES, ids=lambda one: type(one).__name__)
def test_a_rate_is_a_whole_number_of_any_library(prepare: Any, store: ObjectStore, rate: Any) -> None:
    reference = StorageRef.from_json(prepare(SPEECH, {"raw": WAVE, "sampling_rate": rate}))
    stored, found = soundfile.read(io.BytesIO(store.get(reference.uri)), dtype="float32")
    assert found == 8000
    assert np.array_equal(stored, WAVE)


def test_decoders_and_samples_of_torchcodec_are_heard_at_their_own_rate() -> None:
    samples = SimpleNamespace(data=torch.tensor(np.stack([WAVE, 0 * WAVE])), sample_rate=8000.0)
    for value in (samples, SimpleNamespace(get_all_samples=lambda: samples)):
        recording = recording_of(value)
        assert recording.rate == 8000
        assert np.array_equal(np.frombuffer(recording.samples, "<f4"), WAVE / 2)


REFUSED: list[tuple[Any, str]] = [
    (np.zeros((5, 2)), r"first axis of samples of shape \(5, 2\) would be channels.*transpose"),
    (np.zeros((1, 2, 5)), r"not \(1, 2, 5\)"),
    (np.array(0.5), r"not \(\)"),
    (np.zeros(0), "no samples"),
    (np.zeros((2, 0)), "no samples"),
    ([], "no samples"),
    (np.array([0.0, np.nan]), "finite"),
    (np.array([1e300]), "finite"),
    ([0.0, float("inf")], "finite"),
    (np.array(["a"]), "are numbers"),
    (np.array([1j]), "are numbers"),
    (["0.5", "1"], "are numbers"),
    ([0.5, None], "are numbers"),
    ([[0.5], [0.5, 1]], "of one length"),
    (torch.empty(3, device="meta"), "cannot be read from a value of type Tensor"),
    ({"raw": WAVE, "sampling_rate": True}, "whole `sampling_rate`"),
    ({"raw": WAVE, "sampling_rate": np.array([8000, 8000])}, "whole `sampling_rate`"),
    ({"raw": WAVE, "sampling_rate": "8000"}, "whole `sampling_rate`"),
    ({"raw": WAVE, "sampling_rate": 1 << 40}, "between 1000 and 1000000 Hz"),
    ({"raw": WAVE, "array": WAVE, "sampling_rate": 8000}, "not as both"),
    ({"raw": WAVE, "sampling_rate": 8000, "stride": 3}, "`stride` is a pair"),
    ({"raw": WAVE, "sampling_rate": 8000, "stride": [1, -1]}, "`stride` is a pair"),
    ({"raw": WAVE, "sampling_rate": 8000, "stride": [1, 1], "num_frames": 3}, "not both"),
    ({"raw": WAVE, "sampling_rate": 8000, "text": "a"}, "the key 'text' .* would replace"),
    ({"raw": WAVE, "sampling_rate": 8000, "input_features": 1}, "the key 'input_features' .* would replace"),
    (
        {"raw": WAVE, "sampling_rate": 8000, "foo": object()},
        "the key 'foo' .* must be JSON, not a value of type object",
    ),
    ({"raw": WAVE, "sampling_rate": 8000, "foo": {"$ref": "s3://bucket/key"}}, "the key 'foo' .* must be JSON"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_what_is_no_recording_is_refused_with_its_cause(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recording_of(value, extras=True)


def test_a_task_that_makes_nothing_of_a_key_refuses_it_by_name() -> None:
    assert recording_of({"array": WAVE, "sampling_rate": 8000, "path": "a.wav"}).rate == 8000
    for name in ("stride", "foo"):
        with pytest.raises(InputError, match=f"makes nothing of the key '{name}'"):
            recording_of({"raw": WAVE, "sampling_rate": 8000, name: [1, 1]})


def test_stride_and_further_keys_travel_with_the_recording(prepare: Any, store: ObjectStore) -> None:
    given = {
        "raw": WAVE,
        "sampling_rate": np.int64(8000),
        "stride": (np.int64(80), 40),
        "speaker": np.int64(7),
        "id": "a",
    }
    kept = dict(given)
    prepared = prepare(SPEECH, given)
    assert given == kept
    audio_reference = prepared.pop("audio")
    assert prepared == {"stride": [80, 40], "sampling_rate": 8000, "extra": {"speaker": 7, "id": "a"}}
    again = {"audio": StorageRef.from_json(audio_reference).uri, **prepared}  # as the list of failures has it
    assert prepare(SPEECH, again)["stride"] == [80, 40]
    long = prepare(SPEECH, {**given, "note": "n" * 500}, 200)
    assert json.loads(store.get(long["extra"]["$ref"]))["note"] == "n" * 500
    for name in ("strid", "lang"):
        with pytest.raises(InputError, match=f"no field '{name}'"):
            prepare(SPEECH, {**again, name: 1})


@pytest.mark.parametrize("task", [SPEECH, PICTURES])
def test_open_files_are_uploaded_from_where_they_stand(
    prepare: Any, store: ObjectStore, tmp_path: Path, task: str
) -> None:
    path = tmp_path / "a.FLAC"
    path.write_bytes(b"headcontent")
    memory = io.BytesIO(b"headcontent")
    with path.open("rb") as opened, tempfile.SpooledTemporaryFile() as spooled:
        spooled.write(b"headcontent")
        for file in (opened, memory, spooled):
            file.seek(4)
            for _ in range(2):  # an upload that failed is tried again
                assert store.get(prepare(task, file)["$ref"]) == b"content"
        assert prepare(task, opened)["$ref"].endswith(".flac")
        memory.seek(0, io.SEEK_END)
        for file, message in ((memory, r"nothing left to read: seek\(0\)"), (io.StringIO("a"), "mode 'rb'")):
            with pytest.raises(InputError, match=message):
                prepare(task, file)
    with pytest.raises(InputError, match="closed file"):
        prepare(task, opened)


@pytest.mark.parametrize("task", [SPEECH, PICTURES])
def test_columns_that_are_not_decoded_and_paths_of_any_kind_are_taken(
    prepare: Any, store: ObjectStore, tmp_path: Path, task: str
) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(b"content")
    like = SimpleNamespace()
    for value in (
        {"bytes": b"content", "path": "elsewhere.flac"}, {"bytes": None, "path": str(path)}, {"bytes": b"content"},
        {"path": path}, {"path": np.str_(path)}, {"bytes": memoryview(b"content")}, PurePosixPath(path), path, np.str_(path),
    ):  # fmt: skip
        assert store.get(prepare(task, value)["$ref"]) == b"content"
    assert prepare(task, np.str_("s3://media/a.wav"))["$ref"] == "s3://media/a.wav"
    for value, message in (
        ({"bytes": None, "path": None}, "holds neither"),
        ({"path": ""}, "holds neither"),
        ({"path": io.BytesIO(b"content")}, "holds neither"),
        ({"bytes": b"", "path": "elsewhere.flac"}, "bytes of a file"),
        ({"bytes": "text", "path": None}, "holds bytes or None"),
        (b"", "bytes of a file"),
        (memoryview(WAVE), "bytes of a file"),
        (like, "not a value of type SimpleNamespace"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(task, value)


STRIDES: list[dict[str, Any]] = [
    {}, {"stride": (4000, 8000)}, {"stride": (0, 0)}, {"stride": (1001, 3.0)}, {"stride": (16_000, 16_000)},
    {"stride": (4000, 0), "partial": True, "speaker": "a"}, {"foo": [1, 2], "path": "a.wav"}, {"num_frames": 5},
]  # fmt: skip
MODELS = {
    f"{SPEECH}:ctc-masked": [{}, {"return_timestamps": "word"}, {"chunk_length_s": 1}],
    SPEECH: [{}],
    f"{SPEECH}:whisper": [{"return_timestamps": True, "generate_kwargs": {"max_new_tokens": 6}}],
}


@pytest.mark.parametrize("checkpoint", MODELS)
def test_strides_and_further_keys_give_what_transformers_gives(prepare: Any, checkpoint: str) -> None:
    pipe = load(checkpoint)
    samples = audio(2.0, "speech", seed=3)
    calls, wanted = [], []
    for parameters in MODELS[checkpoint]:
        for beside in STRIDES:
            if "num_frames" in beside and "chunk_length_s" in parameters:
                continue  # transformers refuses the strides of its own pieces then
            given = {"raw": samples, "sampling_rate": 16_000, **beside}
            wire = prepare(SPEECH, given)
            calls.append(Call({**wire, "audio": samples} if "audio" in wire else samples, parameters))
            wanted.append(pipe(dict(given), **parameters))
    with running(recording(SpeechRecogniser, load(checkpoint)), SPEECH) as engine:
        outcomes = engine.run(calls)
    for call, outcome, one in zip(calls, outcomes, wanted, strict=True):
        assert outcome.failure is None, outcome.failure
        assert_same(outcome.output, one, str(call.parameters))


def test_a_key_of_the_users_own_may_be_called_audio(prepare: Any) -> None:
    sent = prepare(SPEECH, {"raw": WAVE, "sampling_rate": 16_000, "audio": "a.wav"})
    assert sent["extra"] == {"audio": "a.wav"}


def test_an_open_file_and_a_decoder_are_one_input_of_a_call_a_file_of_text_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"a\nb\n")
    with path.open("rb") as opened, tempfile.SpooledTemporaryFile() as spooled, tempfile.NamedTemporaryFile() as named:
        for file in (opened, spooled, named, io.BytesIO(b"a")):
            assert not is_dataset(file)
    assert not is_dataset(SimpleNamespace(get_all_samples=list))
    assert is_dataset(iter([1]))
