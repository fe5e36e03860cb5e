"""Pictures that hold a picture of another format, which has a header and a size of its own: ICO, ICNS and BLP."""

from __future__ import annotations

import struct
from typing import Any

_BLP_HEADER = struct.Struct("<16I16I")
_BLP_AT = 28
"""Where the offsets and lengths of the sizes of a BLP1 stand."""


def inner(image: Any, content: bytes) -> bytes | None:
    """The file inside `content` that Pillow decodes for `image`, which was opened from it; None where it holds no other."""
    if image.format == "ICO":
        return content[image.ico.entry[0].offset :]
    if image.format == "ICNS":
        return _best_icon(image.icns, content)
    return _jpeg_of_blp(content) if image.format == "BLP" else None


def _best_icon(icon: Any, content: bytes) -> bytes | None:
    for code, _ in icon.SIZES[icon.bestsize()]:
        if code in icon.dct:
            at, size = icon.dct[code]
            return content[at : at + size]
    return None


def _jpeg_of_blp(content: bytes) -> bytes | None:
    """The head that all sizes of a BLP1 share, and the largest of them."""
    start = _BLP_AT + _BLP_HEADER.size
    if content[:8] != b"BLP1\0\0\0\0" or len(content) < start + 4:
        return None
    places = _BLP_HEADER.unpack_from(content, _BLP_AT)
    (head,) = struct.unpack_from("<I", content, start)
    return content[start + 4 : start + 4 + head] + content[places[0] : places[0] + places[16]]
