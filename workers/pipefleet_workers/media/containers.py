"""Containers of recordings: whether a file ends before its own header says. Bytes in, a reason out; nothing is decoded.

Decoders turn a file that was cut short into a short clip without a word. MPEG-TS, ADTS, AMR, ASF, AVI, and MP3 without its
encoder's tag are not checked: most of them do not say how long they are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

_STREAMED = (range(-1, 1), range(0x7FFF_0000, 0x8000_0001), range(0xFFFF_0000, 1 << 32), range(1 << 62, 1 << 64))
"""Sizes that mean "not known": recorders that stream write 0, or about the largest number that fits, signed or not."""
_SEGMENT = b"\x18\x53\x80\x67"
_EBML_PARENTS = (_SEGMENT, b"\x1f\x43\xb6\x75")
"""Segment and Cluster, the elements that recorders which stream leave without a size."""
_MP4_MEDIA = (b"moov", b"moof", b"mdat")
_MP4_FIRST = (*_MP4_MEDIA, b"ftyp", b"styp", b"free", b"skip", b"wide")
_ID3_BYTES = 10
_FIRST_FRAME = 64
"""Bytes of a frame within which the encoder's tag begins, whatever the layout of its channels."""


def truncation(content: bytes) -> str | None:
    """Why a file is shorter than it says, or None where it is whole or does not say."""
    for magic, check in _CHECKS.items():
        if content.startswith(magic):
            return check(content)
    return _mp4(content) if content[4:8] in _MP4_FIRST else _mp3(content)


def _samples(content: bytes, start: int, size: int) -> str | None:
    """`size` bytes of samples begin at `start`."""
    missing = start + size - len(content)
    known = not any(size in sizes for sizes in _STREAMED)
    return f"{missing} bytes of samples are missing" if known and missing > 0 else None


def _chunk(content: bytes, name: bytes, *, at: int, layout: str, align: int = 2) -> tuple[int, int] | None:
    """Start and size of the first chunk of a name; `layout` is the struct of a chunk's name and size."""
    head = struct.calcsize(layout)
    while at + head <= len(content):
        found, size = struct.unpack_from(layout, content, at)
        if found == name:
            return at + head, size
        at += head + max(0, size) + -size % align
    return None


def _riff(content: bytes) -> str | None:
    if content[8:12] != b"WAVE":
        return None
    data = _chunk(content, b"data", at=12, layout="<4sI")
    if data is None:
        return "it has no samples"
    start, size = data
    sizes = _chunk(content, b"ds64", at=12, layout="<4sI") if size == 0xFFFFFFFF else None
    if sizes and sizes[0] + 16 <= len(content):
        (size,) = struct.unpack_from("<8xQ", content, sizes[0])
    return _samples(content, start, size)


def _aiff(content: bytes) -> str | None:
    if content[8:12] not in (b"AIFF", b"AIFC"):
        return None
    data = _chunk(content, b"SSND", at=12, layout=">4sI")
    return _samples(content, *data) if data else "it has no samples"


def _caf(content: bytes) -> str | None:
    data = _chunk(content, b"data", at=8, layout=">4sq", align=1)
    return _samples(content, *data) if data else "it has no samples"


def _w64(content: bytes) -> str | None:
    at = 40
    while at + 24 <= len(content):
        name, size = struct.unpack_from("<4s12xQ", content, at)  # the size counts name and size as well
        if name == b"data":
            return _samples(content, at + 24, size - 24)
        at += max(24, size + -size % 8)
    return "it has no samples"


def _au(content: bytes) -> str | None:
    if len(content) < 12:
        return "the header is cut"
    return _samples(content, *struct.unpack_from(">II" if content[:1] == b"." else "<II", content, 4))


def _ogg(content: bytes) -> str | None:
    """The last page of an Ogg stream carries the end-of-stream flag (RFC 3533, section 6)."""
    at = content.rfind(b"OggS")
    if at + 27 > len(content):
        return "the last page is cut"
    segments = content[at + 26]
    table = content[at + 27 : at + 27 + segments]
    if len(table) < segments or at + 27 + segments + sum(table) > len(content):
        return "the last page is cut"
    return None if content[at + 5] & 4 else "the end of the stream is missing"


def _matroska(content: bytes) -> str | None:
    """Elements of Segment and Cluster are walked only where these say no size of their own (RFC 8794, section 6)."""
    at = 0
    while at < len(content):
        size_at = at + _vint_bytes(content[at])
        start = size_at + _vint_bytes(content[size_at]) if size_at < len(content) else len(content) + 1
        if start > len(content):
            return "the last element is cut"
        bits = 7 * (start - size_at)
        name, size = content[at:size_at], int.from_bytes(content[size_at:start], "big") & ((1 << bits) - 1)
        unknown = size == (1 << bits) - 1
        if unknown and name not in _EBML_PARENTS:
            return None
        at = start if unknown else start + size
        if name == _SEGMENT and not unknown:
            break
    return f"{at - len(content)} bytes are missing" if at > len(content) else None


def _vint_bytes(first: int) -> int:
    """How long an EBML integer is, from its first byte."""
    return 9 - first.bit_length()


def _mp4(content: bytes) -> str | None:
    at = 0
    while at + 16 <= len(content):
        size, name, long = struct.unpack_from(">I4sQ", content, at)
        size = long if size == 1 else size
        if size < 8:  # 0 is "to the end of the file"; the rest is for the decoder to judge
            return None
        at += size
        if name in _MP4_MEDIA and at > len(content):
            return f"{at - len(content)} bytes are missing"
    return None


def _mp3(content: bytes) -> str | None:
    """Encoders write the number of bytes into the first frame (the Xing or Info tag), which ID3 tags may precede."""
    at = 0
    while content[at : at + 3] == b"ID3" and len(content) >= at + _ID3_BYTES:
        footer = _ID3_BYTES if content[at + 5] & 0x10 else 0
        high, upper, lower, low = (byte & 0x7F for byte in content[at + 6 : at + 10])
        at += _ID3_BYTES + (high << 21 | upper << 14 | lower << 7 | low) + footer
    if at > len(content):
        return "its tag is cut"
    frame = content[at : at + _FIRST_FRAME]
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:  # the mark of a frame, layer III
        return None
    return _xing(content, at, max(frame.find(b"Xing"), frame.find(b"Info")))


def _xing(content: bytes, at: int, tag: int) -> str | None:
    """`at` is where the first frame begins, `tag` how far into it the tag does, -1 for none."""
    if tag < 0 or at + tag + 16 > len(content):
        return None
    flags, first, second = struct.unpack_from(">III", content, at + tag + 4)
    missing = at + (second if flags & 1 else first) - len(content)
    return f"{missing} bytes are missing" if flags & 2 and missing > 0 else None


_CHECKS: dict[bytes, Callable[[bytes], str | None]] = {
    b"RIFF": _riff,
    b"RF64": _riff,
    b"BW64": _riff,
    b"FORM": _aiff,
    b"caff": _caf,
    b"riff": _w64,
    b".snd": _au,
    b"dns.": _au,
    b"OggS": _ogg,
    b"\x1a\x45\xdf\xa3": _matroska,
}
