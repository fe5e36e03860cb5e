"""Pictures: from bytes to an upright RGB PIL image, as `transformers.image_utils.load_image` gives it. `Decoder` calls it.

A picture that is damaged or too large raises ItemError before its pixels are decoded.
"""

from __future__ import annotations

import io
import re

from PIL import Image, ImageOps, UnidentifiedImageError

from pipefleet_workers.inputs.declared import coded_pixels
from pipefleet_workers.inputs.formats import PICTURE_FORMATS as FORMATS
from pipefleet_workers.inputs.pictures.inner import inner
from pipefleet_workers.inputs.pictures.pieces import excess
from pipefleet_workers.items import Blob, ItemError

STAGE = "decode"
MOST_SLOW_PIXELS = 1 << 25
"""Pixels of a form that Pillow decodes in Python, 1 to 2 µs each (PPM of odd depths, QOI, BLP, masked DDS …)."""
_UNREAD = {
    rb"(?s)....ftyp(hei[cmsx]|hev[cx]|mif1|msf1)": "HEIC",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"(?s)\s*(<\?xml.{0,1000})?<svg": "SVG",
    rb"%PDF-": "PDF",
}
"""Common formats that Pillow does not open, by the first bytes of a file."""
# By default Pillow cuts large pictures into blocks of 16 MB, which malloc keeps for the thread; blocks above 32 MB go back at once.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]


def decode_image(blob: Blob, *, max_pixels: int) -> Image.Image:
    """The picture, upright by its EXIF orientation, in RGB. Raises ItemError: bad_media, truncated_media, too_large.

    The size is read from the headers before anything is decoded: ten kilobytes can contain a gigabyte of pixels.
    """
    _require_headers(blob, max_pixels)
    image = _opened(blob, max_pixels)
    _require_few_pixels(blob, image.width * image.height, max_pixels)
    _require_quick(blob, image)
    try:
        image.load()
        vars(image).pop("_decoder", None)  # the decoders of WebP and AVIF hold two more copies of all pixels
        ImageOps.exif_transpose(image, in_place=True)  # in place, since a copy of a hundred megapixels takes 400 MB
        return image if image.mode == "RGB" else image.convert("RGB")
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(blob, "more pixels than are opened at all", max_pixels) from None
    except OSError as error:
        raise ItemError("truncated_media", f"{blob.uri} ends too early: {error}", STAGE) from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise anything for damage: KeyError, struct.error …
        raise ItemError("bad_media", f"{blob.uri} is damaged: {_reason(error)}", STAGE) from None


def _opened(blob: Blob, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(blob.content), formats=FORMATS)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        named = next((name for found, name in _UNREAD.items() if re.match(found, blob.content)), None)
        why = f"{named}, which is not read; convert it to PNG" if named else f"not a picture ({', '.join(FORMATS)})"
        raise ItemError("bad_media", f"{blob.uri} is {why}", STAGE) from None
    except Image.DecompressionBombError:
        raise _too_large(blob, "more pixels than are opened at all", max_pixels) from None
    except Exception as error:  # noqa: BLE001 - as above
        raise ItemError("bad_media", f"{blob.uri} cannot be read as a picture: {_reason(error)}", STAGE) from None


def _require_headers(blob: Blob, max_pixels: int) -> None:
    """Raise ItemError for bad headers of the file, or of the file inside it, before Pillow opens it."""
    held = inner(blob.content)
    for content in (blob.content, held) if held else (blob.content,):
        found = excess(content)
        if found:
            raise ItemError("too_large", f"{blob.uri} has {found}", STAGE)
    _require_few_pixels(blob, coded_pixels(blob.content, held), max_pixels)


def _require_few_pixels(blob: Blob, found: int, max_pixels: int) -> None:
    if found > max_pixels:
        raise _too_large(blob, f"{found} pixels", max_pixels)


def _require_quick(blob: Blob, image: Image.Image) -> None:
    found = image.width * image.height
    if found > MOST_SLOW_PIXELS and any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        raise _too_large(blob, f"{found} pixels in a form of {image.format} that is slow to decode", MOST_SLOW_PIXELS)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _too_large(blob: Blob, found: str, bound: int) -> ItemError:
    return ItemError("too_large", f"{blob.uri} has {found}, above the bound of {bound}", STAGE)
