"""Pictures that contain a file of another format, with its own header and size: ICO, ICNS and BLP.

`pictures` and `declared` check the inner file as they check the outer one. Only headers are read, and nothing raises.
"""

from __future__ import annotations

import io
import math
import struct

from PIL.IcnsImagePlugin import IcnsFile

ICON = b"\0\0\1\0"
"""The first bytes of an ICO. Pillow decodes an ICO when it opens it."""
_ENTRY = struct.Struct("<BBBBHHII")
_BLP_PLACES = struct.Struct("<16I16I")
_BLP_AT = 28
"""Place of the offsets and lengths of the sizes of a BLP1."""


def inner(content: bytes) -> bytes | None:
    """The file inside `content` that Pillow decodes; None if there is none. Reads only headers, and never raises."""
    try:
        if content.startswith(ICON):
            return _largest_icon(content)
        if content.startswith(b"icns"):
            return _best_icon(content)
        return _jpeg_of_blp(content) if content.startswith(b"BLP1\0\0\0\0") else None
    except (struct.error, SyntaxError, ValueError):
        return None  # the file ends within its headers, so Pillow will refuse it


def _largest_icon(content: bytes) -> bytes | None:
    """The icon that Pillow chooses: the largest by the directory, and among equals the icon with the fewest colours."""
    (number,) = struct.unpack_from("<H", content, 4)
    icons = list(_ENTRY.iter_unpack(content[6 : 6 + number * _ENTRY.size]))
    if not icons:
        return None
    chosen = max(icons, key=lambda icon: ((icon[0] or 256) * (icon[1] or 256), -_depth(icon[2], icon[5])))
    return content[chosen[7] :]


def _depth(colours: int, bits: int) -> int:
    return bits or (colours and math.ceil(math.log2(colours))) or 256


def _best_icon(content: bytes) -> bytes | None:
    icon = IcnsFile(io.BytesIO(content))
    for code, _ in icon.SIZES[icon.bestsize()]:
        if code in icon.dct:
            at, size = icon.dct[code]
            return content[at : at + size]
    return None


def _jpeg_of_blp(content: bytes) -> bytes | None:
    """The head that all sizes of a BLP1 share, and the largest size."""
    places = _BLP_PLACES.unpack_from(content, _BLP_AT)
    start = _BLP_AT + _BLP_PLACES.size
    (head,) = struct.unpack_from("<I", content, start)
    return content[start + 4 : start + 4 + head] + content[places[0] : places[0] + places[16]]
