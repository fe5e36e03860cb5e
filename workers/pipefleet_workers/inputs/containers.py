"""Containers of media: how much of a file is missing, compared with the length that the file declares.

Bytes go in, a clause and a share come out. Nothing is decoded. The decoders of sound and video call it.

The rule: a file without its index, or without more than a tenth of its declared bytes, was cut, and is refused. If less is missing,
or if a file of undeclared length ends within a piece, the rest is decoded, with a warning. MPEG-TS, MPEG-PS, ADTS, AMR, ASF, FLV,
and MP3 without its encoder's tag are not checked: most of them do not declare their length.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

MOST_MISSING = 0.1
"""The share of the promised bytes that may be missing."""
_STREAMED = (range(-1, 1), range(0x7FFF_0000, 0x8000_0001), range(0xFFFF_0000, 1 << 32), range(1 << 62, 1 << 64))
"""Sizes that mean "not known": recorders that stream write 0, or about the largest number of the field, signed or unsigned."""
_LARGEST = 1 << 30
"""A size above this means "not known" in any smaller file."""
_ROUND = (100_000_000, 1_000_000)
"""A size above the first number that is a multiple of the second number was chosen by a person, such as 2,000,000,000."""
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
"""The mark of a FLAC, and the head of its first block, which has a fixed size."""
_SEGMENT = b"\x18\x53\x80\x67"
_EBML_PARENTS = (_SEGMENT, b"\x1f\x43\xb6\x75")
"""Segment and Cluster: recorders that stream write these elements without a size."""
_MP4_MEDIA = (b"moov", b"moof", b"mdat")
_MP4_INDEX = (b"moov", b"moof")
_MP4_FIRST = (*_MP4_MEDIA, b"ftyp", b"styp", b"free", b"skip", b"wide")
_ID3_BYTES = 10
_MOST_TAGS = 1024
"""ID3 tags before the first frame; the length of a file with more tags counts as not known."""
_FIRST_FRAME = 64
"""The encoder's tag begins within so many bytes of a frame, for every layout of channels."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The missing part of a file: a clause, and its share of the promised bytes (0 if the file promises nothing)."""

    text: str
    share: float = 1.0


def missing_of(content: bytes) -> Missing | None:
    """The missing part at the end of a file; None if the file is complete or promises nothing."""
    for magic, check in _CHECKS.items():
        if content.startswith(magic):
            return check(content)
    return _mp4(content) if content[4:8] in _MP4_FIRST else _mp3(content)


def flac_seconds(content: bytes) -> float | None:
    """The length that a FLAC declares, summed over its parts if it was joined. None for other files, or if a part declares none."""
    if not content.startswith(b"fLaC"):
        return None
    total = 0.0
    for found in FLAC_START.finditer(content):
        packed = int.from_bytes(content[found.start() + 18 : found.start() + 26], "big")
        rate, samples = packed >> 44, packed & ((1 << 36) - 1)
        if not rate or not samples:
            return None
        total += samples / rate
    return total or None


def behind_tags(content: bytes) -> int:
    """The end of the ID3 tags in front of a file, by their declared sizes: 0 without tags, beyond the end if a tag is cut."""
    at = 0
    for _ in range(_MOST_TAGS):
        if content[at : at + 3] != b"ID3" or len(content) < at + _ID3_BYTES:
            break
        footer = _ID3_BYTES if content[at + 5] & 0x10 else 0
        high, upper, lower, low = (byte & 0x7F for byte in content[at + 6 : at + 10])
        at += _ID3_BYTES + (high << 21 | upper << 14 | lower << 7 | low) + footer
    return at


def is_placeholder(size: int) -> bool:
    """Whether a size means "not known"."""
    return any(size in sizes for sizes in _STREAMED) or (size >= _ROUND[0] and size % _ROUND[1] == 0)


def _samples(content: bytes, start: int, size: int) -> Missing | None:
    """The missing part of a file with `size` bytes of samples from `start` on."""
    missing = start + size - len(content)
    if missing <= 0 or is_placeholder(size):
        return None
    return Missing(f"{missing} bytes of samples are missing", 0.0 if size > _LARGEST else missing / size)


def chunk_of(content: bytes, name: bytes, *, at: int, layout: str, align: int = 2) -> tuple[int, int] | None:
    """Start and size of the first chunk with this name; `layout` is the struct of a chunk's name and size."""
    head = struct.calcsize(layout)
    while at + head <= len(content):
        found, size = struct.unpack_from(layout, content, at)
        if found == name:
            return at + head, size
        at += head + max(0, size) + -size % align
    return None


def _avi(content: bytes) -> Missing | None:
    """The missing part of an AVI. A large AVI has several parts, each with its size; a stopped recorder leaves the size 0."""
    at = 0
    while content[at : at + 4] == b"RIFF" and at + 12 <= len(content):
        (size,) = struct.unpack_from("<I", content, at + 4)
        if is_placeholder(size):
            return None
        at += 8 + size + size % 2
    return _bytes_missing(content, at - 1)  # the last byte may be the padding of an odd size


def _riff(content: bytes) -> Missing | None:
    if content[8:12] == b"AVI ":
        return _avi(content)
    if content[8:12] != b"WAVE":
        return None
    data = chunk_of(content, b"data", at=12, layout="<4sI")
    if data is None:
        return Missing("it has no samples")
    start, size = data
    sizes = chunk_of(content, b"ds64", at=12, layout="<4sI") if size == 0xFFFFFFFF else None
    if sizes and sizes[0] + 16 <= len(content):
        (size,) = struct.unpack_from("<8xQ", content, sizes[0])
    return _samples(content, start, size)


def _aiff(content: bytes) -> Missing | None:
    if content[8:12] not in (b"AIFF", b"AIFC"):
        return None
    data = chunk_of(content, b"SSND", at=12, layout=">4sI")
    return _samples(content, *data) if data else Missing("it has no samples")


def _caf(content: bytes) -> Missing | None:
    data = chunk_of(content, b"data", at=8, layout=">4sq", align=1)
    return _samples(content, *data) if data else Missing("it has no samples")


def _w64(content: bytes) -> Missing | None:
    at = 40
    while at + 24 <= len(content):
        name, size = struct.unpack_from("<4s12xQ", content, at)  # the size counts name and size as well
        if name == b"data":
            return None if is_placeholder(size) else _samples(content, at + 24, size - 24)
        at += max(24, size + -size % 8)
    return Missing("it has no samples")


def _au(content: bytes) -> Missing | None:
    if len(content) < 12:
        return Missing("the header is cut")
    return _samples(content, *struct.unpack_from(">II" if content[:1] == b"." else "<II", content, 4))


def _ogg(content: bytes) -> Missing | None:
    """The last page of an Ogg stream must carry the end-of-stream flag (RFC 3533, section 6)."""
    at = content.rfind(b"OggS")
    if at + 27 > len(content):
        return Missing("the last page is cut", 0.0)
    segments = content[at + 26]
    table = content[at + 27 : at + 27 + segments]
    if len(table) < segments or at + 27 + segments + sum(table) > len(content):
        return Missing("the last page is cut", 0.0)
    return None if content[at + 5] & 4 else Missing("the mark of its end is missing", 0.0)


def _matroska(content: bytes) -> Missing | None:
    """Elements inside Segment and Cluster are read only if Segment and Cluster declare no size (RFC 8794, section 6)."""
    at, streamed = 0, False
    while at < len(content):
        size_at = at + _vint_bytes(content[at])
        start = size_at + _vint_bytes(content[size_at]) if size_at < len(content) else len(content) + 1
        if start > len(content):
            return Missing("the last element is cut", 0.0)
        bits = 7 * (start - size_at)
        name, size = content[at:size_at], int.from_bytes(content[size_at:start], "big") & ((1 << bits) - 1)
        unknown = size == (1 << bits) - 1
        if unknown and name not in _EBML_PARENTS:
            return None
        streamed = streamed or unknown
        at = start if unknown else start + size
        if name == _SEGMENT and not unknown:
            break
    return _bytes_missing(content, at, share=0.0 if streamed else None)


def _bytes_missing(content: bytes, promised: int, share: float | None = None) -> Missing | None:
    """The missing part of a file that promises `promised` bytes."""
    missing = promised - len(content)
    return (
        Missing(f"{missing} bytes are missing", missing / promised if share is None else share) if missing > 0 else None
    )


def _vint_bytes(first: int) -> int:
    """The number of bytes of an EBML integer, from its first byte."""
    return 9 - first.bit_length()


def _mp4(content: bytes) -> Missing | None:
    at, indexed, has_media = 0, False, False
    while at + 16 <= len(content):
        size, name, long = struct.unpack_from(">I4sQ", content, at)
        size = long if size == 1 else size
        if size < 8:  # 0 means "to the end of the file"; other values are left to the decoder
            return None
        at += size
        indexed = indexed or (name in _MP4_INDEX and at <= len(content))
        if name in _MP4_MEDIA and at > len(content):
            return _bytes_missing(content, at) if indexed else _NO_INDEX
        has_media = has_media or name == b"mdat"
    return _NO_INDEX if has_media and not indexed else None


def _mp3(content: bytes) -> Missing | None:
    """Encoders write the number of bytes into the first frame (the Xing or Info tag), which ID3 tags may precede."""
    at = behind_tags(content)
    if at > len(content):
        return Missing("its tag is cut")
    frame = content[at : at + _FIRST_FRAME]
    if len(frame) < 4 or frame[0] != 0xFF or frame[1] & 0xE6 != 0xE2:  # the mark of a frame, layer III
        return None
    return _xing(content, at, max(frame.find(b"Xing"), frame.find(b"Info")))


def _xing(content: bytes, at: int, tag: int) -> Missing | None:
    """The missing part by the encoder's tag. The first frame begins at `at`; the tag begins `tag` bytes later, -1 for no tag."""
    if tag < 0 or at + tag + 16 > len(content):
        return None
    flags, first, second = struct.unpack_from(">III", content, at + tag + 4)
    missing = at + (second if flags & 1 else first) - len(content)
    return _bytes_missing(content, len(content) + missing) if flags & 2 else None


_NO_INDEX = Missing("its index (moov) is missing")
_CHECKS: dict[bytes, Callable[[bytes], Missing | None]] = {
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
