"""Pictures as people hold them: PIL objects of every mode, EXIF, `data:` URIs, base64, parts of chats, cells of columns."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from pipefleet.contract.references import StorageRef
from pipefleet.errors import InputError
from pipefleet.inputs.pictures import inline, picture_file
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.inputs.sources import open_source
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.inputs.pictures.pictures import decode_image
from pipefleet_workers.items import Blob, ItemError
from tests.parity import harness
from tests.parity.harness import Call, load, recording, running
from tests.unit.worker.inputs.test_picture_formats import CASES, FILES, WIDTH, deep, encoded, picture, with_alpha

PICTURES, CHATS = "image-classification", "image-text-to-text"
URI = "s3://bucket/a.png"


class Road:
    """From what a user passes to what the model's side sees."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    def preparer(self, task: str) -> InputPreparer:
        return InputPreparer(task_spec(task), self.store, self.prefix, inline_bytes=1000)

    def content(self, reference: Any) -> bytes:
        return self.store.get(StorageRef.from_json(reference).uri)

    def sent(self, value: Any, task: str = PICTURES) -> bytes:
        return self.content(self.preparer(task).prepare(value))

    def seen(self, value: Any) -> Image.Image:
        return seen(self.sent(value))


def seen(content: bytes) -> Image.Image:
    """What the model's side makes of an upload."""
    return decode_image(Blob("s3://bucket/key", content, None), max_pixels=10_000_000)


@pytest.fixture
def road(store: ObjectStore, prefix: str) -> Road:
    return Road(store, prefix)


def assert_same(found: Image.Image, wanted: Image.Image) -> None:
    assert (found.mode, found.size) == (wanted.mode, wanted.size)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def turned(form: str, **options: Any) -> Image.Image:
    exif = Image.Exif()
    exif[0x112] = 6
    return opened(encoded(form, exif=exif, **options))


def with_palette_alpha() -> Image.Image:
    image = picture("P")
    image.putpalette(bytes(range(256)) * 4, "RGBA")
    return image


def of_integers(low: int, high: int) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 1536).astype(np.int32).reshape(32, 48))


def second_frame(form: str) -> Image.Image:
    image = opened(encoded(form, save_all=True, append_images=[picture().rotate(180)]))
    image.seek(1)
    return image


OBJECTS: dict[str, Callable[[], Image.Image]] = {
    **{mode: lambda mode=mode: picture(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "F", "I", "RGBX")},
    "RGBA": with_alpha,
    "LA": lambda: with_alpha().convert("LA"),
    "PA": lambda: with_alpha().convert("PA"),
    "RGBa": lambda: with_alpha().convert("RGBa"),
    "I;16": deep,
    "I;16N": lambda: Image.frombytes("I;16N", deep().size, deep().tobytes()),
    "I;16B": lambda: deep().convert("I").convert("I;16B"),
    "I beyond 16 bits": lambda: of_integers(-70_000, 90_000_000),
    "F beyond 8 bits": lambda: Image.fromarray(np.linspace(-3, 900, 1536, dtype=np.float32).reshape(32, 48)),
    "palette with one transparent colour": lambda: opened(encoded("PNG", picture().quantize(32), transparency=3)),
    "palette with transparencies": lambda: opened(encoded("PNG", picture().quantize(32), transparency=bytes(range(32)))),
    "palette with alpha": with_palette_alpha,
    "grey with a transparent value": lambda: opened(encoded("PNG", picture("L"), transparency=7)),
    "colour with a transparent value": lambda: opened(encoded("PNG", transparency=(200, 200, 200))),
    "turned JPEG": lambda: turned("JPEG"),
    "turned PNG": lambda: turned("PNG"),
    "turned WEBP": lambda: turned("WEBP", lossless=True),
    "turned TIFF": lambda: turned("TIFF", compression="tiff_lzw"),
    "JPEG of CMYK": lambda: opened(encoded("JPEG", picture("CMYK"))),
    "TIFF compressed with loss": lambda: opened(encoded("TIFF", picture("L"), compression="jpeg")),
    "with a profile": lambda: opened(encoded("PNG", icc_profile=b"not one")),
    "GIF at its second frame": lambda: second_frame("GIF"),
    "APNG at its second frame": lambda: second_frame("PNG"),
    "WEBP at its second frame": lambda: second_frame("WEBP"),
    "TIFF at its second page": lambda: second_frame("TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_gives_what_transformers_makes_of_it(name: str) -> None:
    given = OBJECTS[name]()
    before = given.mode, given.tobytes()
    assert_same(seen(picture_file(given)[0]), load_image(OBJECTS[name]()))
    assert (given.mode, given.tobytes()) == before


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I", "F", "CMYK", "I;16", "I beyond 16 bits", "F beyond 8 bits"]
)
def test_modes_that_a_file_holds_travel_as_they_are(mode: str) -> None:
    given = OBJECTS[mode]()
    sent = opened(picture_file(given)[0])
    assert (sent.mode, sent.size, sent.tobytes()) == (given.mode, given.size, given.tobytes())


def test_which_colours_are_transparent_travels() -> None:
    for name in ("palette with one transparent colour", "palette with transparencies", "palette with alpha"):
        assert_same(opened(picture_file(OBJECTS[name]())[0]).convert("RGBA"), OBJECTS[name]().convert("RGBA"))


@pytest.mark.parametrize("name", ["avif.avif", "int32.tif", "exif_orient6.jpg"])
def test_the_cases_are_the_same_as_object_as_file_and_as_transformers_sees_them(road: Road, name: str) -> None:
    wanted = load_image(str(CASES / name))
    assert_same(road.seen(Image.open(CASES / name)), wanted)
    assert_same(road.seen(CASES / name), wanted)


def test_an_object_that_cannot_be_read_is_refused_in_a_sentence(road: Road) -> None:
    with pytest.raises(InputError, match="the picture cannot be read: OSError"):
        road.sent(opened(encoded("PNG")[:200]))
    with pytest.raises(InputError, match="the picture cannot be read: ValueError"):  # Pillow does not convert it either
        road.sent(with_alpha().convert("LA").convert("La"))
    with pytest.raises(InputError, match="no pixels: its size is 0 x 5"):
        road.sent(Image.new("RGB", (0, 5)))


def test_arrays_of_bytes_are_pictures_as_in_image_classification(road: Road) -> None:
    array = np.array(picture("RGB"))
    pipe = load(PICTURES)
    for given in (array, array.transpose(2, 0, 1), torch.tensor(array), torch.tensor(array).permute(2, 0, 1)):
        assert_same(road.seen(given), picture("RGB"))
        harness.assert_same(pipe(road.seen(given)), pipe(given), "array")


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3), "f4"), torch.zeros(3, 4, 4), np.zeros((4, 4), "u1"), np.zeros((4, 4, 4), "u1"), np.float32(1)],
)
def test_other_arrays_are_refused_in_a_sentence(road: Road, array: Any) -> None:
    with pytest.raises(InputError, match=r"uint8 of the shape .*PIL\.Image\.fromarray"):
        road.sent(array)


# Inside texts


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.mark.parametrize(
    "form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PSD", "ICO", "QOI", "DDS"]
)
def test_base64_is_a_picture_as_in_transformers(form: str) -> None:
    content = (b"8BPS" + bytes(99)) if form == "PSD" else encoded(form)
    text = base64_of(content)
    for given in (f"data:image/{form.lower()};base64,{text}", text, base64.encodebytes(content).decode()):
        found = inline(given)
        assert found
        assert found[0] == content
    if form != "PSD":
        assert_same(seen(content), load_image(text))


def test_a_data_uri_says_its_type(road: Road) -> None:
    text = base64_of(encoded("PNG"))
    reference = StorageRef.from_json(road.preparer(PICTURES).prepare(f"data:image/png;base64,{text}"))
    assert (reference.type, reference.uri[-4:]) == ("image/png", ".png")
    for head in ("data:image/png,", "data:;base64,", "DATA:image/../x;base64,", "data:image/png;charset=utf-8;base64,"):
        assert road.sent(head + text) == encoded("PNG")
    assert road.sent("data:image/png;base64," + text.replace("+", "%2B").replace("=", "%3D")) == encoded("PNG")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data:image/png;base64,a?b=", "not base64"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png", "not a data: URI"),
        ("no/such/picture", "cannot read the input"),
        ("a" * 300, "cannot read the input"),
        ("/9j/" + "a" * 28 + ".jpg", "cannot read the input"),
        ("https://example.org/a.png", "nothing from the web"),
    ],
)
def test_other_texts_are_refused_by_their_reason(road: Road, text: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        road.sent(text)


def test_a_file_comes_before_base64(road: Road, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = base64_of(b"\x89PNG\r\n\x1a\n" + bytes(24)).replace("/", "a")
    Path(name).write_bytes(encoded("GIF"))
    assert road.sent(name) == encoded("GIF")


def test_a_picture_whose_base64_is_damaged_is_named_as_such(road: Road) -> None:
    whole = base64_of(encoded("PNG"))
    for text in (whole.rstrip("=")[:-1] + "!", whole[:101], whole[:100] + "= = =" + whole[100:]):
        with pytest.raises(InputError, match="begins like a picture in base64"):
            road.sent(text)


def test_a_picture_inside_a_text_is_bounded(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipefleet.inputs.pictures.MOST_INLINE", 100)
    for text in (base64_of(encoded("PNG")), "data:image/png;base64," + base64_of(encoded("PNG"))):
        with pytest.raises(InputError, match="100 characters at most"):
            road.sent(text)


def test_a_manifest_holds_pictures(road: Road, tmp_path: Path) -> None:
    spec = task_spec(PICTURES)
    manifest = tmp_path / "lines.jsonl"
    line = json.dumps({"inputs": "data:image/png;base64," + base64_of(encoded("PNG"))})
    manifest.write_text((CASES / "datauri.jsonl").read_text().strip() + "\n" + line)
    source = open_source(manifest, spec, road.store, road.preparer(PICTURES), output=road.prefix, strict=True)
    source.check()
    begun, whole = [road.content(item.inputs) for item in source.items(0, None)]
    assert whole == encoded("PNG")
    with pytest.raises(ItemError) as caught:  # it ends after eight bytes, and transformers cannot open it either
        decode_image(Blob("s3://bucket/key", begun, None), max_pixels=100)
    assert caught.value.failure.code == "bad_media"


# Where pictures stand


def test_cells_of_an_undecoded_column_are_pictures(road: Road, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    for task in (PICTURES, "image-to-text", "zero-shot-object-detection"):
        assert road.sent({"bytes": encoded("GIF"), "path": "elsewhere.gif"}, task) == encoded("GIF")
        assert road.sent({"bytes": None, "path": str(path)}, task) == encoded("PNG")
    reference = road.preparer("vqa").prepare({"image": {"bytes": encoded("GIF")}, "question": "Who?"})["image"]
    assert road.content(reference) == encoded("GIF")
    with pytest.raises(InputError, match="neither the bytes of a file nor the path"):
        road.sent({"bytes": None, "path": None})


def test_open_files_are_pictures_wherever_one_may_stand(road: Road, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    with path.open("rb") as file:
        for given in (file, io.BytesIO(encoded("PNG"))):
            part = {"type": "image", "image": given}
            chat = [{"role": "user", "content": [part, {"type": "image_url", "image_url": {"url": given}}]}]
            parts = road.preparer(CHATS).prepare(chat)[0]["content"]
            pair = road.preparer("keypoint-matching").prepare([given, given])
            several = road.preparer(CHATS).prepare({"images": [given, given], "text": "What?"})["images"]
            asked = road.preparer("vqa").prepare({"image": given, "question": "Who?"})["image"]
            alone = road.preparer(PICTURES).prepare(given)
            for reference in [alone, asked, *several, *pair, *(one["image"] for one in parts)]:
                assert road.content(reference) == encoded("PNG")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": picture()},
        {"type": "image", "base64": base64_of(encoded("PNG"))},
        {"type": "image", "url": "data:image/png;base64," + base64_of(encoded("PNG"))},
        {"type": "image", "path": "PATH"},
        {"type": "image", "image": {"bytes": encoded("PNG"), "path": None}, "text": None},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64_of(encoded("PNG"))}},
        {"type": "image_url", "image_url": {"url": "PATH", "detail": "auto"}},
        {"type": "image_url", "image_url": "PATH"},
    ],
)
def test_every_form_of_a_picture_in_a_chat_travels(road: Road, tmp_path: Path, part: dict[str, Any]) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    named = {name: str(path) if one == "PATH" else one for name, one in part.items()}
    if isinstance(named.get("image_url"), dict) and named["image_url"]["url"] == "PATH":
        named["image_url"] = {**named["image_url"], "url": str(path)}
    chat = [{"role": "user", "content": [named, {"type": "text", "text": "What?", "image": None}]}]
    first, second = road.preparer(CHATS).prepare(chat)[0]["content"]
    assert first == {"type": "image", "image": first["image"]}
    assert opened(road.content(first["image"])).size[0] == WIDTH
    assert second == {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
        {"type": "image_url", "image_url": {}},
        {"type": "image_url"},
        {"type": "image", "image": URI, "base64": "x"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ],
)
def test_a_part_that_holds_more_or_less_is_refused(road: Road, part: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        road.preparer(CHATS).prepare([{"role": "user", "content": [part]}])


def test_a_model_answers_as_transformers_does_for_every_format_and_mode() -> None:
    pipe = load(PICTURES)
    files = [FILES[name]() for name in FILES] + [
        (CASES / name).read_bytes() for name in ("avif.avif", "exif_orient6.jpg")
    ]
    contents = files + [picture_file(OBJECTS[name]())[0] for name in OBJECTS]
    wanted = [pipe(opened(one)) for one in files] + [pipe(OBJECTS[name]()) for name in OBJECTS]
    adapter = recording(RUNTIME[PICTURES].adapter, pipe)
    with running(adapter, PICTURES) as one:
        found = one.run([Call(Blob("s3://bucket/key", content, None), {}) for content in contents])
    for name, outcome, result in zip([*FILES, "avif.avif", "exif_orient6.jpg", *OBJECTS], found, wanted, strict=True):
        harness.assert_same(outcome.output, result, name)
