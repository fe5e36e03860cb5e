"""The pieces that a decoder allocates for the headers of a JPEG 2000, before any pixel: tiles, components, blocks.

Bytes go in, a size or the name of an excess comes out; nothing raises. `declared` asks for the size, `pieces` for the excess.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MOST_TILES = 1 << 13
MOST_COMPONENTS = 16
MOST_BLOCKS = 1 << 20
"""Most blocks of coefficients, of some 600 bytes each; a block has 64 by 64 coefficients by default."""
MOST_PARTS = 1 << 16
"""Most parts of tiles; each part has a header of its own."""
_CODESTREAM = b"\xff\x4f\xff\x51"
_BOX = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_COD, _COC, _SOT, _SOD = 0x52, 0x53, 0x90, 0x93


def is_jpeg2000(content: bytes) -> bool:
    """Whether a file begins as a JPEG 2000, in a box or bare."""
    return content.startswith((_CODESTREAM, _BOX))


def size(content: bytes) -> tuple[int, int]:
    """Width and height that the codestream itself declares; 0, 0 if there is no codestream."""
    at = content.find(_CODESTREAM)
    if at < 0 or len(content) < at + 40:
        return 0, 0
    right, bottom, left, top = struct.unpack_from(">IIII", content, at + 8)
    return max(0, right - left), max(0, bottom - top)


def excess(content: bytes) -> str | None:
    """The kind of piece of which a file has far too many, or None. Reads only headers."""
    at = content.find(_CODESTREAM)
    try:
        return _excess(content, at) if at >= 0 else None
    except (struct.error, IndexError):
        return None  # the file ends within its headers, so the decoder will refuse it


def _excess(content: bytes, at: int) -> str | None:
    right, bottom, left, top, *tile, components = struct.unpack_from(">8IH", content, at + 8)
    width, height, x, y = tile
    tiles = -(-(right - x) // max(1, width)) * -(-(bottom - y) // max(1, height))
    if tiles > MOST_TILES:
        return f"more than {MOST_TILES} tiles"
    if components > MOST_COMPONENTS:
        return f"more than {MOST_COMPONENTS} components"
    coefficients = components * min(width, right - left) * min(height, bottom - top)
    for index, block in enumerate(_blocks(content, at + 2, 1 if components < 257 else 2)):
        if index > MOST_PARTS:
            return f"more than {MOST_PARTS} parts of tiles"
        if block and coefficients * 4 // 3 // block > MOST_BLOCKS:
            return f"more than {MOST_BLOCKS} blocks"
    return None


def _blocks(content: bytes, at: int, index_bytes: int) -> Iterator[int]:
    """Coefficients of the smallest block that each coding style allows; 0 for each part of a tile."""
    part, part_size = 0, 0
    while at + 4 <= len(content):
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if content[at] != 0xFF:
            return
        if marker == _SOT:
            part, part_size = at, int.from_bytes(content[at + 6 : at + 10], "big")
            yield 0
        if marker == _COD:
            yield _block(content, at + 9, content[at + 4])
        if marker == _COC:
            yield _block(content, at + 5 + index_bytes, content[at + 4 + index_bytes])
        if marker == _SOD:
            if part_size < 14:  # this part extends to the end of the file
                return
            at = part + part_size
        else:
            at += 2 + length


def _block(content: bytes, at: int, style: int) -> int:
    """Coefficients of a block; a precinct smaller than a block reduces it."""
    levels, width, height = content[at], (content[at + 1] & 15) + 2, (content[at + 2] & 15) + 2
    if style & 1:
        for precinct in content[at + 5 : at + 6 + levels]:
            width, height = min(width, max(0, (precinct & 15) - 1)), min(height, max(0, (precinct >> 4) - 1))
    return 1 << (width + height)
