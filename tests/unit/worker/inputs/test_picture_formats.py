"""Every format that Pillow opens comes out as transformers opens it, within bounds that hold before memory is spent."""

from __future__ import annotations

import io
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from pipefleet_workers.inputs.declared import PIXEL, picture_bytes
from pipefleet_workers.inputs.formats import PICTURE_FORMATS
from pipefleet_workers.inputs.pictures import avif, jpeg2000
from pipefleet_workers.inputs.pictures.pictures import MOST_SLOW_PIXELS, decode_image
from pipefleet_workers.items import Blob, ItemError

CASES = Path(__file__).parents[3] / "cases"
WIDTH, HEIGHT = 48, 32


def picture(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:9, :20] = 200
    return Image.fromarray(pixels).convert(mode)


def with_alpha() -> Image.Image:
    image = picture("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def deep() -> Image.Image:
    return Image.fromarray(np.arange(WIDTH * HEIGHT, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 40)


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def cursor() -> bytes:
    icon = bytearray(encoded("ICO", with_alpha(), sizes=[(WIDTH, HEIGHT)], bitmap_format="bmp"))
    icon[2] = 2
    return bytes(icon)


def dcx() -> bytes:
    return struct.pack("<III", 0x3ADE68B1, 12, 0) + encoded("PCX")


def qoi() -> bytes:
    return encoded("QOI", with_alpha())


def fits(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    cards = ["SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", f"NAXIS1  = {width}", f"NAXIS2  = {height}", "END"]
    return "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(range(256)) * 6


def sun() -> bytes:
    return struct.pack(">8I", 0x59A66A95, WIDTH, HEIGHT, 24, WIDTH * HEIGHT * 3, 1, 0, 0) + picture().tobytes(
        "raw", "BGR"
    )


def xpm() -> bytes:
    rows = "".join(f'"{"ab" * 4}",\n' for _ in range(6))
    return f'/* XPM */\nstatic char *x[] = {{\n"8 6 2 1",\n"a c #FF0000",\n"b c None",\n{rows}}};\n'.encode()


def masked_dds(width: int, height: int, content: bytes) -> bytes:
    """16 bits a pixel, 5, 6 and 5 for red, green and blue."""
    form = struct.pack("<8I", 32, 0x40, 0, 16, 0xF800, 0x7E0, 0x1F, 0)
    return struct.pack("<4s7I", b"DDS ", 124, 0x1007, height, width, 0, 0, 0) + bytes(44) + form + bytes(20) + content


def gbr() -> bytes:
    return struct.pack(">5I4sI", 30, 2, WIDTH, HEIGHT, 4, b"GIMP", 0) + b"x\0" + with_alpha().tobytes()


def blp_with_jpeg(image: Image.Image, width: int, height: int) -> bytes:
    content = encoded("JPEG", image)
    places = [160, *[0] * 15, len(content), *[0] * 15]
    return struct.pack("<4siiiiii32I", b"BLP1", 0, 0, width, height, 4, 0, *places) + struct.pack("<I", 0) + content


def icns(content: bytes, code: bytes = b"ic07") -> bytes:
    return struct.pack(">4sI4sI", b"icns", 16 + len(content), code, 8 + len(content)) + content


def ico(content: bytes) -> bytes:
    return struct.pack("<3H4B2H2I", 0, 1, 1, 1, 1, 0, 0, 1, 32, len(content), 22) + content


FILES: dict[str, Callable[[], bytes]] = {
    "avif": lambda: encoded("AVIF"),
    "avif alpha": lambda: encoded("AVIF", with_alpha()),
    "avif animation": lambda: encoded("AVIF", save_all=True, append_images=[picture().rotate(180)]),
    "jpeg 2000": lambda: encoded("JPEG2000"),
    "jpeg 2000 grey alpha in tiles": lambda: encoded("JPEG2000", with_alpha().convert("LA"), tile_size=(16, 16)),
    "jpeg 2000 16 bit": lambda: encoded("JPEG2000", deep()),
    "jpeg 2000 bare": lambda: encoded("JPEG2000", no_jp2=True),
    "tga": lambda: encoded("TGA"),
    "tga alpha compressed": lambda: encoded("TGA", with_alpha(), compression="tga_rle"),
    "tga palette": lambda: encoded("TGA", picture().quantize(16)),
    "ico": lambda: encoded("ICO", sizes=[(16, 16), (32, 32)]),
    "ico of bitmaps": lambda: encoded("ICO", with_alpha(), sizes=[(WIDTH, HEIGHT)], bitmap_format="bmp"),
    "icns": lambda: encoded("ICNS", with_alpha().resize((128, 128))),
    "icns of jpeg 2000": lambda: icns(encoded("JPEG2000", with_alpha().resize((128, 128)))),
    "cur": cursor,
    "pcx": lambda: encoded("PCX"),
    "pcx black and white": lambda: encoded("PCX", picture("1")),
    "dcx": dcx,
    "dds": lambda: encoded("DDS", with_alpha()),
    "dds compressed": lambda: encoded("DDS", with_alpha(), pixel_format="DXT5"),
    "dds masked": lambda: masked_dds(WIDTH, HEIGHT, bytes(range(256)) * 12),
    "dib": lambda: encoded("DIB"),
    "sgi": lambda: encoded("SGI"),
    "sgi 16 bit": lambda: encoded("SGI", bpc=2),
    "qoi": qoi,
    "msp": lambda: encoded("MSP", picture("1")),
    "xbm": lambda: encoded("XBM", picture("1")),
    "xpm": xpm,
    "im": lambda: encoded("IM"),
    "im float": lambda: encoded("IM", picture("F")),
    "spider": lambda: encoded("SPIDER", picture("F")),
    "blp": lambda: encoded("BLP", picture().quantize(64)),
    "blp of a jpeg": lambda: blp_with_jpeg(picture(), WIDTH, HEIGHT),
    "sun": sun,
    "fits": fits,
    "gbr": gbr,
    "pgm 16 bit": lambda: encoded("PPM", deep()),
    "pfm": lambda: encoded("PPM", picture("F")),
    "ppm plain": lambda: b"P3 2 1 15 1 2 3 15 0 7",
    "tiff int32": lambda: encoded("TIFF", picture("I")),
    "tiff float": lambda: encoded("TIFF", picture("F")),
    "tiff 16 bit": lambda: encoded("TIFF", deep()),
    "tiff lab": lambda: encoded("TIFF", Image.new("LAB", (WIDTH, HEIGHT), (120, 30, 200))),
    "tiff of pages": lambda: encoded("TIFF", save_all=True, append_images=[picture().rotate(180)]),
    "png animation": lambda: encoded("PNG", save_all=True, append_images=[picture().rotate(180)]),
    "psd": lambda: psd(WIDTH, HEIGHT, picture()),
}  # fmt: skip


def psd(width: int, height: int, image: Image.Image) -> bytes:
    head = struct.pack(">4sH6sHIIHH", b"8BPS", 1, bytes(6), 3, height, width, 8, 3)
    return head + bytes(12) + b"\0\0" + b"".join(band.tobytes() for band in image.split())


def decode(content: bytes, *, max_pixels: int = 10_000_000) -> Image.Image:
    return decode_image(Blob("s3://bucket/key", content, None), max_pixels=max_pixels)


def attempt(content: bytes) -> str:
    """The mode of the picture, or the code of its refusal."""
    try:
        return decode(content).mode
    except ItemError as error:
        return error.failure.code


def refusal(content: bytes, **options: int) -> str:
    with pytest.raises(ItemError) as caught:
        decode(content, **options)
    return caught.value.failure.code


def assert_as_transformers(content: bytes) -> None:
    found, wanted = decode(content), load_image(Image.open(io.BytesIO(content)))
    assert (found.mode, found.size) == ("RGB", wanted.size)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_those_that_transformers_would_see(name: str) -> None:
    assert_as_transformers(FILES[name]())


@pytest.mark.parametrize("name", ["avif.avif", "int32.tif", "exif_orient6.jpg"])
def test_pictures_of_the_cases_are_as_transformers_sees_them(name: str) -> None:
    assert_as_transformers((CASES / name).read_bytes())


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"%PDF-1.7\n", "PDF"),
    ],
)
def test_a_format_that_people_have_is_named_where_it_is_not_read(content: bytes, name: str) -> None:
    with pytest.raises(ItemError, match=f"is {name}, which is not read; convert it to PNG") as caught:
        decode_image(Blob("s3://bucket/key", content, None), max_pixels=1 << 20)
    assert caught.value.failure.code == "bad_media"


def test_what_runs_programs_or_opens_any_format_stays_closed() -> None:
    assert not {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"} & set(PICTURE_FORMATS)
    assert refusal(encoded("EPS")) == "bad_media"
    assert refusal(icns(encoded("EPS"))) == "bad_media"


@pytest.mark.parametrize("name", FILES)
def test_damage_never_raises_anything_but_a_refusal(name: str) -> None:
    content, rng = FILES[name](), random.Random(name)
    for turn in range(40):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(min(len(content), rng.choice((64, 512, len(content)))))] = rng.randrange(256)
        cut = bytes(damaged)[: rng.randrange(len(content))] if turn % 4 == 0 else bytes(damaged)
        assert picture_bytes(cut) >= 0
        assert attempt(cut) in ("RGB", "bad_media", "truncated_media", "too_large")


# Bounds


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


LARGE = {
    "ico": ico(png_header(4000, 4000)),
    "ico of a bitmap": ico(struct.pack("<IiiHHIIiiII", 40, 4000, 8000, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(64)),
    "icns": icns(png_header(4000, 4000)),
    "blp": blp_with_jpeg(Image.new("L", (4000, 4000)), 8, 8),
    "psd": psd(30_000, 30_000, Image.new("RGB", (1, 1))),
    "dds": masked_dds(60_000, 60_000, b""),
    "fits": fits(100_000, 100_000),
    "qoi": b"qoif" + struct.pack(">IIBB", 60_000, 60_000, 3, 0) + bytes(64),
    "sgi": encoded("SGI")[:6] + struct.pack(">HH", 60_000, 60_000) + encoded("SGI")[10:],
    "tga": encoded("TGA")[:12] + struct.pack("<HH", 60_000, 60_000) + encoded("TGA")[16:],
}


@pytest.mark.parametrize("name", LARGE)
def test_pixels_are_counted_before_they_are_decoded(name: str) -> None:
    assert refusal(LARGE[name]) == "too_large"


@pytest.mark.parametrize("name", ["ico", "ico of a bitmap", "icns", "blp"])
def test_a_picture_inside_another_weighs_its_own_pixels(name: str) -> None:
    assert picture_bytes(LARGE[name]) >= 4000 * 4000 * PIXEL


def jpeg2000_with(at: int, form: str, *values: int) -> bytes:
    """A bare codestream whose header holds `values` from byte `at` on."""
    content = bytearray(encoded("JPEG2000", no_jp2=True))
    struct.pack_into(form, content, at, *values)
    return bytes(content)


def test_a_codestream_of_another_size_than_its_box_is_counted() -> None:
    content = encoded("JPEG2000")
    at = content.index(b"\xff\x4f\xff\x51")
    lying = content[: at + 8] + struct.pack(">II", 9000, 9000) + content[at + 16 :]
    assert refusal(lying) == "too_large"
    assert picture_bytes(lying) == 9000 * 9000 * PIXEL


def test_tiles_components_and_blocks_of_a_jpeg_2000_are_bounded() -> None:
    plain = encoded("JPEG2000", no_jp2=True)
    assert jpeg2000.excess(plain) is None
    style = plain.index(b"\xff\x52")
    many_tiles = jpeg2000_with(8, ">8I", 60_000, 60_000, 0, 0, 250, 250, 0, 0)
    many_parts = jpeg2000_with(40, ">H", 16_384)
    whole = struct.pack(">8I", 10_000, 9_000, 0, 0, 10_000, 9_000, 0, 0)
    small_blocks = bytearray(plain[:8] + whole + plain[40:])
    small_blocks[style + 10 : style + 12] = b"\0\0"
    precincts = bytearray(plain[:8] + whole + plain[40:])
    precincts[style + 4] |= 1
    precincts[style + 14 : style + 14] = b"\x11" * 6
    struct.pack_into(">H", precincts, style + 2, struct.unpack_from(">H", plain, style + 2)[0] + 6)
    for content in (many_tiles, many_parts, bytes(small_blocks), bytes(precincts)):
        assert jpeg2000.excess(content)
        assert refusal(content, max_pixels=100_000_000) == "too_large"


@pytest.mark.parametrize("name", ["avif", "avif alpha", "avif animation"])
def test_an_avif_is_as_large_as_its_stream_says(name: str) -> None:
    content = FILES[name]()
    assert avif.size(content) == (WIDTH, HEIGHT)
    lying = content
    for at in [found.start() for found in re.finditer(b"ispe", content)]:
        lying = lying[: at + 8] + struct.pack(">II", 4, 4) + lying[at + 16 :]
    assert refusal(lying, max_pixels=WIDTH * HEIGHT - 1) == "too_large"
    assert picture_bytes(lying) == WIDTH * HEIGHT * PIXEL


def test_the_tiles_of_an_avif_weigh_as_the_whole_picture() -> None:
    content = (CASES / "avif.avif").read_bytes()
    width, height = Image.open(CASES / "avif.avif").size
    assert avif.size(content) == (width, height)
    larger = content.replace(struct.pack(">II", width, height), struct.pack(">II", 3 * width, 3 * height))
    assert picture_bytes(larger) == 9 * width * height * PIXEL


def test_a_form_that_is_slow_to_decode_has_a_lower_bound() -> None:
    side = int(MOST_SLOW_PIXELS**0.5) + 1
    assert refusal(masked_dds(side, side, b""), max_pixels=100_000_000) == "too_large"
    assert refusal(b"/* XPM */" + bytes(65 << 20)) == "too_large"
