"""Pictures: bytes to an upright RGB PIL image, as `transformers.image_utils.load_image` gives it."""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from pipefleet_workers.items import Blob, ItemError
from pipefleet_workers.media.formats import PICTURE_FORMATS as FORMATS
from pipefleet_workers.media.pieces import excess

STAGE = "decode"
# Pillow cuts large pictures into blocks of 16 MB, which malloc keeps for the thread; those above 32 MB always go back at once.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]


def decode_image(blob: Blob, *, max_pixels: int) -> Image.Image:
    """The picture, upright by its EXIF orientation, in RGB. Raises ItemError: bad_media, truncated_media, too_large.

    The size is read from the header before anything is decoded: ten kilobytes can hold a gigabyte of pixels.
    """
    pieces = excess(blob.content)
    if pieces:
        raise ItemError("too_large", f"{blob.uri} has {pieces}", STAGE)
    try:
        image = Image.open(io.BytesIO(blob.content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ItemError("bad_media", f"{blob.uri} is not a picture ({', '.join(FORMATS)})", STAGE) from None
    except Image.DecompressionBombError:
        raise _too_large(blob, "more pixels than are opened at all", max_pixels) from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ItemError("bad_media", f"{blob.uri} cannot be read as a picture: {error}", STAGE) from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise _too_large(blob, f"{pixels} pixels", max_pixels)
    try:
        image.load()
        vars(image).pop("_decoder", None)  # WebP's holds two more copies of all pixels
        ImageOps.exif_transpose(image, in_place=True)  # a copy of a hundred megapixels takes 400 MB
        return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError:
        raise _too_large(blob, "more pixels than are opened at all", max_pixels) from None
    except OSError as error:
        raise ItemError("truncated_media", f"{blob.uri} ends too early: {error}", STAGE) from None
    except (ValueError, SyntaxError, EOFError) as error:
        raise ItemError("bad_media", f"{blob.uri} is damaged: {error}", STAGE) from None


def _too_large(blob: Blob, found: str, bound: int) -> ItemError:
    return ItemError("too_large", f"{blob.uri} has {found}, above the bound of {bound}", STAGE)
