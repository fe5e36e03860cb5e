"""Pictures as users hold them: PIL objects, arrays, `data:` URIs, base64. Out come the bytes of a file, its suffix and type.

The rules are those of `transformers.image_utils.load_image`. `uploads` and `prepare` call these functions. InputError names the
fault of a picture. Pillow and numpy are needed only for objects of theirs.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import sys
from typing import Any
from urllib.parse import unquote_to_bytes

from pipefleet.errors import InputError

MOST_INLINE = 256 << 20
"""Most characters of a picture inside of a text, as base64."""
LONGEST_PATH = 4096
"""Most characters of a path on Linux. A longer text names no file."""
_DATA = re.compile(r"data:([^,;]{0,100})[^,]{0,200},", re.IGNORECASE)
_SPACE = re.compile(rb"\s+")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"8BPS", b"DDS ", b"qoif",
    b"\0\0\1\0", b"\0\0\2\0", b"icns", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"\x01\xda", b"BLP", b"\x59\xa6\x6a\x95", b"/* XPM",
    b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n", b"#define ",
)  # fmt: skip
_SUFFIXES = {
    "jpeg": "jpg",
    "svg+xml": "svg",
    "x-icon": "ico",
    "vnd.microsoft.icon": "ico",
    "vnd.adobe.photoshop": "psd",
}
_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA"}
_TIFF_MODES = {"I", "F", "CMYK", "I;16", "I;16L", "I;16B", "I;16N"}


def is_picture(value: Any) -> bool:
    """Whether `value` is a PIL image. Its attributes tell, so Pillow need not be installed."""
    return hasattr(value, "save") and hasattr(value, "mode")


def inline(text: str) -> tuple[bytes, str, str | None] | None:
    """Bytes, suffix and media type of a picture inside of a text; None for any other text, such as a path.

    Raises InputError for a `data:` URI that cannot be read.
    """
    found = _DATA.match(text)
    if found:
        return _from_data_uri(text, found)
    if text[:5].lower() == "data:":
        raise InputError(f"not a data: URI of a picture: {text[:80]!r}; it is data:image/png;base64,…")
    return _from_base64(text)


def picture_file(image: Any) -> tuple[bytes, str, str]:
    """Bytes, suffix and media type of a file that holds a PIL image: its current frame, upright, and without loss.

    The file is PNG or TIFF, if one of them holds the image's mode. Other modes (YCbCr, HSV, LAB, La …) become RGB, as in every
    pipeline. Profiles and EXIF stay behind. Raises InputError for an image that cannot be read.
    """
    from PIL import ImageOps  # a caller with such an object has Pillow

    try:
        image = ImageOps.exif_transpose(image)
        image = image if image.mode in _PNG_MODES | _TIFF_MODES else image.convert("RGB")
    except (
        Exception
    ) as error:  # files are read lazily, so a damaged one raises here; so does a mode that Pillow does not convert (La)
        raise InputError(f"the picture cannot be read: {type(error).__name__}: {error}") from error
    if not all(image.size):
        raise InputError(f"the picture has no pixels: its size is {image.width} x {image.height}")
    if image.mode == "I;16N":  # this machine's byte order, under a name that TIFF does not take
        from PIL import Image

        image = Image.frombytes("I;16" if sys.byteorder == "little" else "I;16B", image.size, image.tobytes())
    bare = image.copy()
    bare.info = _transparency(image)
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        bare.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue(), "png", "image/png"
    bare.save(buffer, format="TIFF", compression="raw")
    return buffer.getvalue(), "tiff", "image/tiff"


def picture_of_array(value: Any) -> Any:
    """The PIL image of an array or tensor of uint8 with three channels, on an axis where transformers looks for channels.

    Raises InputError for any other array: it does not tell how bright its numbers are.
    """
    shape, kind = tuple(getattr(value, "shape", ())), str(getattr(value, "dtype", "")).removeprefix("torch.")
    first = len(shape) == 3 and shape[0] == 3
    if kind != "uint8" or not (first or (len(shape) == 3 and shape[0] != 1 and shape[2] == 3)):
        raise InputError(
            "an array is a picture where it is uint8 of the shape (height, width, 3) or (3, height, width), not "
            f"{kind[:40]} of {shape}: pass PIL.Image.fromarray(array)"
        )
    try:
        import numpy
        from PIL import Image
    except ImportError as error:
        raise InputError(f"pictures in arrays need {error.name}: pip install numpy pillow") from None
    content = numpy.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    return Image.fromarray(numpy.ascontiguousarray(content.transpose(1, 2, 0) if first else content))


def _transparency(image: Any) -> dict[str, Any]:
    """The transparent colours of a palette, as Pillow's info."""
    found = image.info.get("transparency")
    return {"transparency": found} if image.mode == "P" and isinstance(found, int | bytes) else {}


def _from_data_uri(text: str, head: re.Match[str]) -> tuple[bytes, str, str | None]:
    _require_short(text)
    content = _SPACE.sub(b"", unquote_to_bytes(text[head.end() :]))
    try:
        decoded = base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise InputError(f"the data: URI {text[:60]!r} is not base64: {error}") from None
    if not decoded:
        raise InputError(f"the data: URI {text[:60]!r} is empty")
    kind = head[1].lower()
    name = kind.removeprefix("image/") if kind.startswith("image/") else ""
    suffix = _SUFFIXES.get(name, name)
    return decoded, suffix if re.fullmatch("[a-z0-9]{1,8}", suffix) else "bin", kind if name else None


def _from_base64(text: str) -> tuple[bytes, str, None] | None:
    """The picture in a base64 text; None for other texts. It begins like a picture's file, or is too long for a path."""
    if len(text) < 32 or not _BASE64.match(text[:64]):
        return None
    begin = _decoded("".join(text[:120].split())[:64])
    if begin is None or not (len(text) > LONGEST_PATH or _is_signed(begin)):
        return None
    _require_short(text)
    decoded = _decoded("".join(text.split())) if _BASE64.fullmatch(text) else None
    if not decoded and _is_signed(begin):
        raise InputError(
            f"the text {text[:40]!r} begins like a picture in base64 and is not base64 to its end, nor a file here"
        )
    return (decoded, "bin", None) if decoded else None


def _is_signed(begin: bytes) -> bool:
    return begin.startswith(_SIGNATURES) or begin[8:12] == b"WEBP" or begin[4:8] == b"ftyp"


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _require_short(text: str) -> None:
    if len(text) > MOST_INLINE:
        raise InputError(
            f"a picture inside a text has {MOST_INLINE} characters at most, not {len(text)}: put it into a file"
        )
