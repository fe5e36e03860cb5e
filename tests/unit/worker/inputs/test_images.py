"""Pictures: every format and colour mode comes out upright in RGB as transformers opens it; damaged ones are refused by code."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from pipefleet_workers.inputs.pictures.pictures import decode_image
from pipefleet_workers.items import Blob, ItemError

WIDTH, HEIGHT = 97, 61
ORIENTATION = 0x112


def picture() -> Image.Image:
    """Not symmetric in any way, with noise so that it does not shrink to nothing."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:20, :30] += 150
    return Image.fromarray(pixels)


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded("JPEG", exif=exif, quality=95)


def decode(content: bytes, *, max_pixels: int = 10_000_000) -> Image.Image:
    return decode_image(Blob("s3://bucket/key", content, None), max_pixels=max_pixels)


def refusal(content: bytes, **options: int) -> str:
    with pytest.raises(ItemError) as caught:
        decode(content, **options)
    assert caught.value.failure.stage == "decode"
    assert "s3://bucket/key" in caught.value.failure.message
    return caught.value.failure.code


def attempt(content: bytes) -> Image.Image | str:
    """The picture, or the code of its refusal."""
    try:
        return decode(content)
    except ItemError as error:
        return error.failure.code


def _alpha() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _deep() -> Image.Image:
    return Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH))


FILES: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: encoded("JPEG"),
    "jpeg progressive": lambda: encoded("JPEG", progressive=True),
    "jpeg grey": lambda: encoded("JPEG", picture().convert("L")),
    "jpeg cmyk": lambda: encoded("JPEG", picture().convert("CMYK")),
    "jpeg of two pictures": lambda: encoded("MPO", save_all=True, append_images=[picture().rotate(180)]),
    "png": lambda: encoded("PNG"),
    "png palette": lambda: encoded("PNG", picture().quantize(32)),
    "png palette with transparency": lambda: encoded("PNG", picture().quantize(32), transparency=3),
    "png alpha": lambda: encoded("PNG", _alpha()),
    "png grey alpha": lambda: encoded("PNG", _alpha().convert("LA")),
    "png 16 bit": lambda: encoded("PNG", _deep()),
    "png black and white": lambda: encoded("PNG", picture().convert("1")),
    "webp": lambda: encoded("WEBP"),
    "webp lossless alpha": lambda: encoded("WEBP", _alpha(), lossless=True),
    "gif": lambda: encoded("GIF"),
    "gif animation": lambda: encoded("GIF", save_all=True, append_images=[picture().rotate(180)], duration=50),
    "bmp": lambda: encoded("BMP"),
    "ppm": lambda: encoded("PPM"),
    "tiff": lambda: encoded("TIFF"),
    "tiff lzw": lambda: encoded("TIFF", compression="tiff_lzw"),
    "tiff cmyk": lambda: encoded("TIFF", picture().convert("CMYK")),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_that_transformers_would_see(name: str) -> None:
    content = FILES[name]()
    found = decode(content)
    assert (found.mode, found.size) == ("RGB", (WIDTH, HEIGHT))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(Image.open(io.BytesIO(content)))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    content = turned(orientation)
    found = decode(content)
    assert found.size == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
    assert np.array_equal(np.asarray(found), np.asarray(load_image(Image.open(io.BytesIO(content)))))
    # Turned once here, it must not be turned again by the pipeline's own load_image.
    assert np.array_equal(np.asarray(found), np.asarray(load_image(found)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.9])
def test_half_a_picture_is_refused(name: str, kept: float) -> None:
    if name == "jpeg of two pictures":
        kept *= 0.4  # the second picture is not looked at
    if name.startswith("gif animation"):
        kept *= 0.5
    content = FILES[name]()
    assert refusal(content[: int(len(content) * kept)]) in ("truncated_media", "bad_media")


@pytest.mark.parametrize("name", FILES)
def test_two_missing_bytes_are_noticed_or_hold_no_pixels(name: str) -> None:
    content = FILES[name]()
    found = attempt(content[:-2])
    if isinstance(found, str):
        assert found in ("truncated_media", "bad_media")
    else:
        assert np.array_equal(np.asarray(found), np.asarray(decode(content)))


def test_a_jpeg_without_its_last_two_bytes_is_refused() -> None:
    assert refusal(encoded("JPEG")[:-2]) == "truncated_media"


def _png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_a_picture_above_the_bound_is_refused_before_it_is_decoded() -> None:
    assert refusal(_png_header(4001, 2500), max_pixels=10_000_000) == "too_large"
    assert refusal(encoded("PNG"), max_pixels=WIDTH * HEIGHT - 1) == "too_large"
    assert decode(encoded("PNG"), max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"II*\0",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0",
        b"<svg></svg>",
        b"hello, this is a text\n" * 50,
        bytes(4096),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes) -> None:
    assert refusal(content) == "bad_media"


@pytest.mark.parametrize("size", [(100_000, 100_000), (2_000_000_000, 2_000_000_000)])
def test_a_decompression_bomb_above_pillows_own_bound_is_too_large(size: tuple[int, int]) -> None:
    assert refusal(_png_header(*size)) == "too_large"


@pytest.mark.parametrize("name", FILES)
def test_damage_never_raises_anything_but_a_refusal(name: str) -> None:
    content, rng = FILES[name](), random.Random(name)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            # Behind the magic number: that a file without one is refused has a test of its own.
            damaged[rng.randrange(12, min(len(content), rng.choice((64, 512, len(content)))))] = rng.randrange(256)
        found = attempt(bytes(damaged))
        if isinstance(found, str):
            assert found in ("bad_media", "truncated_media", "too_large")
        else:
            assert found.mode == "RGB"
