"""Counts the missing and damaged pages of an Ogg, by their numbers and checksums.

FFmpeg skips such pages, with their sound, without an error. So `recordings` asks here, and adds the number to the losses of a file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import islice

_HEAD = struct.Struct("<4sBBqIII")
_HEAD_BYTES = 27
_FIRST = 2
_MOST_PAGES = 1 << 20
"""Most pages that are checked. An encoder's pages of this number hold hours."""
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def lost_pages(content: bytes) -> int:
    """The number of pages that have a wrong checksum or whose previous page is missing; 0 for other files.

    A recording of a broadcast has the head of the stream and goes on in its middle; this gap is no loss.
    """
    if not content.startswith(b"OggS"):
        return 0
    lost, before = 0, dict[int, tuple[int, int]]()
    for at in islice(_places(content), _MOST_PAGES):
        _, _, flags, granule, serial, number, checksum = _HEAD.unpack_from(content, at)
        page = content[at : at + _size(content, at)]
        if _checksum(page) != checksum:
            lost += 1
            number, granule = before.get(serial, (0, 0))[0] + 1, max(1, granule)
        elif not flags & _FIRST and serial in before:
            last, position = before[serial]
            lost += number > last + 1 and position > 0
        before[serial] = (number, granule)
    return lost


def _places(content: bytes) -> Iterator[int]:
    at = 0
    while (at := content.find(b"OggS", at)) >= 0 and at + _HEAD_BYTES <= len(content):
        if at + _size(content, at) > len(content):
            return  # the last page is cut; `containers` reports the missing end
        yield at
        at += _size(content, at)


def _size(content: bytes, at: int) -> int:
    segments = content[at + 26]
    return _HEAD_BYTES + segments + sum(content[at + _HEAD_BYTES : at + _HEAD_BYTES + segments])


def _checksum(page: bytes) -> int:
    """The checksum of an Ogg page: zlib's, with all bits in reverse order and without its complements."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    found = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{found:032b}"[::-1], 2)
