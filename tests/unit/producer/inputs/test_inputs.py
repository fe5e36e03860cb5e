"""What a user passes, and what travels: uploads by content, texts inline, everything else refused."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipefleet.contract.references import StorageRef
from pipefleet.errors import InputError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.uploads import RAW_AUDIO, TEXT_TYPE
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import TASKS, Media

SPEECH, PICTURES, TEXTS = "automatic-speech-recognition", "image-classification", "text-classification"


class Prepare:
    """Prepares inputs under a prefix of the test's own."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    def __call__(self, task: str, value: Any) -> Any:
        return self.preparer(task).prepare(value)

    def preparer(self, task: str, *, inline_bytes: int = 100) -> InputPreparer:
        return InputPreparer(TASKS[task], self.store, self.prefix, inline_bytes=inline_bytes)

    def uploads(self) -> list[str]:
        return [entry.key for entry in self.store.list(self.prefix)]


@pytest.fixture
def prepare(store: ObjectStore, prefix: str) -> Prepare:
    return Prepare(store, prefix)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo 1.JPG"
    Image.new("RGB", (4, 3), "red").save(path, format="JPEG")
    return path


@pytest.mark.parametrize("task", [name for name, row in TASKS.items() if row.media not in (None, Media.IMAGE_PAIR)])
def test_a_uri_becomes_a_reference_without_looking_at_the_object(prepare: Prepare, task: str) -> None:
    assert prepare(task, "s3://media/none.jpg") == {"$ref": "s3://media/none.jpg", "type": "image/jpeg"}
    reference = StorageRef("s3://media/none.jpg", "etag", 5, "image/png").to_json()
    assert prepare(task, reference) == reference
    assert not prepare.uploads()


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_local_file_is_uploaded_with_its_type(prepare: Prepare, photo: Path, as_type: type) -> None:
    reference = StorageRef.from_json(prepare(PICTURES, as_type(photo)))
    assert prepare.store.get(reference.uri) == photo.read_bytes()
    found = prepare.store.head(reference.uri)
    assert found is not None
    assert (found.size, found.type) == (reference.size, reference.type) == (photo.stat().st_size, "image/jpeg")
    assert hashlib.sha256(photo.read_bytes()).hexdigest() in reference.key


def test_the_same_content_is_stored_once(prepare: Prepare, photo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "another.jpg"
    copy.write_bytes(photo.read_bytes())
    assert prepare(PICTURES, photo) == prepare(PICTURES, copy) == prepare(PICTURES, photo)
    assert len(prepare.uploads()) == 1
    prepare(PICTURES, b"other content")
    assert len(prepare.uploads()) == 2


def test_what_was_uploaded_is_not_sent_again(prepare: Prepare, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(PICTURES, photo)
    monkeypatch.setattr(ObjectStore, "put_new", lambda *_, **__: pytest.fail("the content travels a second time"))
    assert prepare(PICTURES, photo) == first


@pytest.mark.parametrize("task", [SPEECH, PICTURES])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_uploaded_as_they_are(prepare: Prepare, task: str, kind: type) -> None:
    reference = StorageRef.from_json(prepare(task, kind(b"\x00encoded\xff")))
    assert prepare.store.get(reference.uri) == b"\x00encoded\xff"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "LA"])
def test_an_image_object_is_uploaded_without_loss(prepare: Prepare, mode: str) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode)
    reference = StorageRef.from_json(prepare(PICTURES, image))
    with Image.open(io.BytesIO(prepare.store.get(reference.uri))) as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", mode, (4, 4))
        assert stored.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_an_image_of_a_mode_that_neither_png_nor_tiff_holds_travels_as_rgb(prepare: Prepare, mode: str) -> None:
    reference = StorageRef.from_json(prepare(PICTURES, Image.new(mode, (2, 3))))
    with Image.open(io.BytesIO(prepare.store.get(reference.uri))) as stored:
        assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (2, 3))


def test_a_path_to_a_text_is_uploaded_though_a_string_would_be_the_text(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    reference = StorageRef.from_json(prepare(TEXTS, tmp_path / "a.txt"))
    assert prepare.store.get(reference.uri) == b"hello"
    assert prepare(TEXTS, str(tmp_path / "a.txt")) == str(tmp_path / "a.txt")


@pytest.mark.parametrize("task", [PICTURES, TEXTS])
def test_a_key_may_hold_spaces_but_a_line_end_is_none_of_it(prepare: Prepare, task: str) -> None:
    assert prepare(task, "s3://media/my file 1.bin")["$ref"] == "s3://media/my file 1.bin"
    assert prepare(task, "s3://media/a.bin\r\n")["$ref"] == "s3://media/a.bin"


def test_a_text_of_several_lines_is_a_text_whatever_it_begins_with(prepare: Prepare) -> None:
    text = "s3://media/a\nis where it lies"
    assert prepare(TEXTS, text) == text
    assert prepare(PICTURES, text)["$ref"] == text  # nothing but a URI can stand here, and a key may hold anything


def test_a_dry_preparer_refuses_the_same_and_uploads_nothing(prepare: Prepare, photo: Path) -> None:
    dry = prepare.preparer(PICTURES).dry()
    dry.prepare(str(photo))
    dry.prepare(b"bytes")
    for wrong in ("none.jpg", 3, "http://example.org/cat.jpg", "s3://Bad_Bucket/x"):
        with pytest.raises(InputError):
            dry.prepare(wrong)
    assert not prepare.uploads()


def test_samples_without_a_rate_travel_bare(prepare: Prepare) -> None:
    samples = np.linspace(-1, 1, 50)
    reference = StorageRef.from_json(prepare(SPEECH, samples))
    assert reference.type == RAW_AUDIO
    assert np.frombuffer(prepare.store.get(reference.uri), "<f4") == pytest.approx(samples.astype("f4"))


@pytest.mark.parametrize("field", ["raw", "array"])
def test_samples_with_a_rate_become_a_wav_that_others_read(prepare: Prepare, field: str) -> None:
    samples = np.sin(np.arange(800) / 10).astype("f4")
    reference = StorageRef.from_json(prepare(SPEECH, {field: samples, "sampling_rate": 8000}))
    content = prepare.store.get(reference.uri)
    stored, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    assert rate == 8000
    assert np.array_equal(stored, samples)
    assert reference.type == "audio/wav"


@pytest.mark.parametrize("url", ["http://example.org/cat.jpg", "https://example.org/cat.jpg"])
@pytest.mark.parametrize("task", [PICTURES, SPEECH])
def test_nothing_is_fetched_from_the_web(prepare: Prepare, task: str, url: str) -> None:
    with pytest.raises(InputError, match=r"workers fetch nothing from the web: copy 'https?://example\.org/cat\.jpg'"):
        prepare(task, url)


REFUSED = [
    (PICTURES, "", "an empty text names no file"),
    (PICTURES, "none.jpg", r"cannot read the input 'none\.jpg': No such file"),
    (PICTURES, "a\x00b.jpg", "cannot read the input .*: embedded null byte"),
    (PICTURES, Path(), "cannot read the input '.'"),
    (PICTURES, 3, "takes s3:// URIs, local paths, bytes or image objects, not a value of type int"),
    (PICTURES, None, "not a value of type NoneType"),
    (PICTURES, {"image": "x"}, "not a value of type dict"),
    (PICTURES, ["a", "b"], "not a value of type list"),
    (PICTURES, "s3://Bad_Bucket/x", "not a bucket name"),
    (SPEECH, np.zeros((5, 2)), "first axis of samples .* would be channels"),
    (SPEECH, [0.1, "0.2"], "audio samples in a list are numbers"),
    (SPEECH, {"raw": np.zeros(5)}, "a whole `sampling_rate`"),
    (SPEECH, {"raw": np.zeros(5), "sampling_rate": 0}, "a whole `sampling_rate`"),
    (SPEECH, {"raw": np.zeros(5), "sampling_rate": 16000.5}, "a whole `sampling_rate`"),
    (SPEECH, {"sampling_rate": 16000}, "an audio dict needs `raw`"),
    (TEXTS, 3, "takes texts, s3:// URIs of texts or Path objects, not a value of type int"),
    (TEXTS, b"bytes", "not a value of type bytes"),
    (TEXTS, ["a", "b"], "not a value of type list"),
    (TEXTS, {"txt": "a"}, r"takes no field 'txt' \(did you mean 'text'\?\); it takes text, text_pair"),
    (TEXTS, {"text": "a", "text_pair": 3}, "not a value of type int"),
    ("feature-extraction", {"text": "a"}, "not a value of type dict"),
]


@pytest.mark.parametrize(("task", "value", "message"), REFUSED)
def test_an_input_of_another_kind_is_refused_by_name(prepare: Prepare, task: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(task, value)
    assert not prepare.uploads()


def test_a_text_travels_inline_and_so_do_the_fields_of_a_pair(prepare: Prepare) -> None:
    assert prepare(TEXTS, "see s3://media/a") == "see s3://media/a"
    pair = {"text": "s3://media/a.txt", "text_pair": "b"}
    assert prepare(TEXTS, pair) == {"text": {"$ref": "s3://media/a.txt", "type": "text/plain"}, "text_pair": "b"}


@pytest.mark.parametrize("text", ["x" * 101, "ü" * 60, '"' * 60], ids=["long", "wide", "escaped"])
def test_a_text_too_long_for_a_message_is_moved_to_the_store(prepare: Prepare, text: str) -> None:
    preparer = prepare.preparer(TEXTS)
    reference = StorageRef.from_json(preparer.spill(text))
    assert prepare.store.get(reference.uri).decode() == text
    assert reference.type == TEXT_TYPE
    assert StorageRef.from_json(preparer.spill({"text": "short", "text_pair": text})["text_pair"]) == reference


def test_what_fits_a_message_is_left_alone(prepare: Prepare) -> None:
    preparer = prepare.preparer(TEXTS)
    for value in ("x" * 98, {"text": "a", "text_pair": "b"}, {"$ref": "s3://media/" + "k" * 200}):
        assert preparer.spill(value) is value
    assert not prepare.uploads()
