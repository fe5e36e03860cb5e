"""Pictures: bytes to an upright RGB PIL image, as `transformers.image_utils.load_image` gives it."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from pipefleet_workers.items import Blob, ItemError
from pipefleet_workers.media.declared import pixels
from pipefleet_workers.media.formats import PICTURE_FORMATS as FORMATS
from pipefleet_workers.media.inner import inner
from pipefleet_workers.media.pieces import excess

STAGE = "decode"
MOST_SLOW_PIXELS = 1 << 25
"""Pixels of a form that Pillow decodes in Python, 1 to 2 µs each (PPM of odd depths, QOI, BLP, masked DDS …)."""
# Pillow cuts large pictures into blocks of 16 MB, which malloc keeps for the thread; those above 32 MB always go back at once.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]


def decode_image(blob: Blob, *, max_pixels: int) -> Image.Image:
    """The picture, upright by its EXIF orientation, in RGB. Raises ItemError: bad_media, truncated_media, too_large.

    The size is read from the headers before anything is decoded: ten kilobytes can hold a gigabyte of pixels.
    """
    _require_few_pieces(blob, blob.content)
    image = _opened(blob, max_pixels)
    _require_room(blob, image, max_pixels)
    try:
        image.load()
        vars(image).pop("_decoder", None)  # those of WebP and AVIF hold two more copies of all pixels
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a hundred megapixels takes 400 MB
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
        raise ItemError("bad_media", f"{blob.uri} is not a picture ({', '.join(FORMATS)})", STAGE) from None
    except Image.DecompressionBombError:
        raise _too_large(blob, "more pixels than are opened at all", max_pixels) from None
    except Exception as error:  # noqa: BLE001 - as above
        raise ItemError("bad_media", f"{blob.uri} cannot be read as a picture: {_reason(error)}", STAGE) from None


def _require_room(blob: Blob, image: Image.Image, max_pixels: int) -> None:
    """Raise ItemError for too many pixels: of the picture, of one inside of it, or of a format that takes long for each."""
    try:
        held = inner(image, blob.content)
        found = pixels(image, blob.content)
    except Exception as error:  # noqa: BLE001 - the headers of an icon are the file's own
        raise ItemError("bad_media", f"{blob.uri} is damaged: {_reason(error)}", STAGE) from None
    if held:
        _require_few_pieces(blob, held)
    if found > max_pixels:
        raise _too_large(blob, f"{found} pixels", max_pixels)
    if found > MOST_SLOW_PIXELS and any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        raise _too_large(blob, f"{found} pixels in a form of {image.format} that is slow to decode", MOST_SLOW_PIXELS)


def _require_few_pieces(blob: Blob, content: bytes) -> None:
    found = excess(content)
    if found:
        raise ItemError("too_large", f"{blob.uri} has {found}", STAGE)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _too_large(blob: Blob, found: str, bound: int) -> ItemError:
    return ItemError("too_large", f"{blob.uri} has {found}, above the bound of {bound}", STAGE)
