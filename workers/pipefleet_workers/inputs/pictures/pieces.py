"""Finds picture files of far too many pieces: a piece takes a few bytes in the file, but time and memory when it is decoded.

A progressive JPEG may go over all its pixels again for every hundred bytes. Pillow keeps a list of the strips of a TIFF, and of the
unknown chunks of a PNG. `pictures` asks `excess` before it decodes, and refuses such files.
"""

from __future__ import annotations

import re
import struct

from pipefleet_workers.inputs.pictures import avif, jpeg2000

MOST_SCANS = 200
"""Most scans of a JPEG; encoders write at most twenty."""
MOST_CHUNKS = 20_000
"""Most chunks of a PNG that contain no pixels."""
MOST_STRIPS = 1 << 18
"""Most strips or tiles of a TIFF."""
MOST_PARSED = 64 << 20
"""Most bytes of an XPM or a BLP; Pillow turns them into a dict or a list in Python while it opens or decodes the file."""
_PARSED = (b"/* XPM */", b"BLP1", b"BLP2")
_JPEG, _PNG, _TIFF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", (b"II", b"MM")
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""The end of the compressed bytes of a scan: any marker except a restart marker."""
_START_OF_SCAN, _END = 0xDA, 0xD9
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_STRIPS = (273, 324)


def excess(content: bytes) -> str | None:
    """The kind of piece of which a picture's file has far too many, or None. Reads only the heads of pieces."""
    if len(content) > MOST_PARSED and content.startswith(_PARSED):
        return f"more than {MOST_PARSED} bytes, for its format"
    if content.startswith(_JPEG):
        return _scans(content)
    if content.startswith(_PNG):
        return _chunks(content)
    if jpeg2000.is_jpeg2000(content):
        return jpeg2000.excess(content)
    if avif.is_avif(content):
        return avif.excess(content)
    return _strips(content) if content[:2] in _TIFF else None


def _scans(content: bytes) -> str | None:
    at, found = 2, 0
    while at + 4 <= len(content):
        marker = content[at + 1]
        if content[at] != 0xFF or marker == _END:
            return None
        if marker in _ALONE or marker == 0xFF:
            at += 1 if marker == 0xFF else 2
            continue
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == _START_OF_SCAN:
            found += 1
            after = _MARKER.search(content, at)
            if after is None:
                return None
            at = after.start()
        if found > MOST_SCANS:
            return f"more than {MOST_SCANS} scans"
    return None


def _chunks(content: bytes) -> str | None:
    at, found = len(_PNG), 0
    while at + 12 <= len(content) and found <= MOST_CHUNKS:
        size, name = struct.unpack_from(">I4s", content, at)
        found += name != b"IDAT" or not size
        at += 12 + size
    return f"more than {MOST_CHUNKS} chunks without pixels" if found > MOST_CHUNKS else None


def _strips(content: bytes) -> str | None:
    """The number of strips, from the first directory of tags."""
    order = "<" if content[:1] == b"I" else ">"
    try:
        (version,) = struct.unpack_from(order + "H", content, 2)
        layouts = (8, "Q", "Q", "HHQQ") if version == 43 else (4, "I", "H", "HHII")
        start, pointer, number, entry = layouts
        (at,) = struct.unpack_from(order + pointer, content, start)
        (tags,) = struct.unpack_from(order + number, content, at)
        at += struct.calcsize(order + number)
        for index in range(min(tags, 1 << 16)):
            tag, _, count, _ = struct.unpack_from(order + entry, content, at + index * struct.calcsize(order + entry))
            if tag in _STRIPS and count > MOST_STRIPS:
                return f"more than {MOST_STRIPS} strips"
    except struct.error:
        return None
    return None
