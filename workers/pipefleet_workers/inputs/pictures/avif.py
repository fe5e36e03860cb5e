"""The size of the AV1 streams of an AVIF, by their own headers: the decoder allocates this size, whatever the container declares.

Bytes go in, a size or the name of an excess comes out. `declared` asks for the size, `pieces` for the excess.

Only sequence headers are read. A frame that overrides the size of its sequence is bounded only by the decoder (2^28 pixels).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MOST_STREAMS = 4096
"""Most items and tracks: tiles of a grid, their alpha, frames."""
MOST_UNITS = 1000
"""Most units (OBUs) of a stream before its sequence header, which usually comes first or second."""
_CONTAINERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"meta"})
_SEQUENCE_HEADER = 1


def is_avif(content: bytes) -> bool:
    """Whether a file begins as an AVIF, or as a sequence of them."""
    return content[4:8] == b"ftyp" and content[8:12] in (b"avif", b"avis", b"mif1", b"msf1")


def size(content: bytes) -> tuple[int, int]:
    """Width and height of the largest stream; 0, 0 if no stream is found. Never raises."""
    found = (0, 0)
    for begin in _streams(content):
        try:
            found = max(found, _sequence_size(begin), key=lambda one: one[0] * one[1])
        except (IndexError, ValueError):
            continue  # this item is no AV1 stream, or ends within its header
    return found


def excess(content: bytes) -> str | None:
    """The kind of piece of which a file has far too many, or None."""
    for index, _ in enumerate(_streams(content)):
        if index >= MOST_STREAMS:
            return f"more than {MOST_STREAMS} streams"
    return None


def _streams(content: bytes) -> Iterator[memoryview]:
    """The first bytes of each item and track."""
    whole, data, tables = memoryview(content), 0, []
    for name, start, end in _boxes(content, 0, len(content)):
        data = start if name == b"idat" else data
        tables += [(name, start, end)] if name in (b"iloc", b"stco", b"co64") else []
    for name, start, end in tables:
        try:
            if name == b"iloc":
                yield from _items(whole, whole[start:end], data)
            else:
                (first,) = struct.unpack_from(">I" if name == b"stco" else ">Q", content, start + 8)
                yield whole[first:]
        except (struct.error, IndexError):
            continue  # the decoder will refuse such a table


def _boxes(content: bytes, at: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the content of each box, boxes inside others included."""
    while at + 8 <= end:
        length, name = struct.unpack_from(">I4s", content, at)
        head = 16 if length == 1 else 8
        if head == 16:
            length = int.from_bytes(content[at + 8 : at + 16], "big")
        stop = min(end, at + length if length else end)
        if stop < at + head:
            return
        yield name, at + head, stop
        if name in _CONTAINERS and depth < len(_CONTAINERS):
            yield from _boxes(content, at + head + 4 * (name == b"meta"), stop, depth + 1)
        at = stop


def _items(whole: memoryview, table: memoryview, data: int) -> Iterator[memoryview]:
    """The items of a table of locations (ISO/IEC 14496-12, 8.11.3); the pieces of an item are joined."""
    version, at, joined = table[0], 8, 0
    offset_bytes, length_bytes, base_bytes = table[4] >> 4, table[4] & 15, table[5] >> 4
    index_bytes = table[5] & 15 if version else 0
    number = _number(table, 6, 4 if version == 2 else 2)
    at += 2 if version == 2 else 0
    for _ in range(number):
        at += 4 if version == 2 else 2
        inside = bool(version and _number(table, at, 2) & 15)
        at += 4 if version else 2
        base = _number(table, at, base_bytes) + (data if inside else 0)
        at += base_bytes
        pieces = []
        extents = _number(table, at, 2)
        at += 2
        for _ in range(extents):
            at += index_bytes
            start, length = base + _number(table, at, offset_bytes), _number(table, at + offset_bytes, length_bytes)
            at += offset_bytes + length_bytes
            pieces.append(whole[start : start + length] if length else whole[start:])
        joined += sum(len(one) for one in pieces) if len(pieces) > 1 else 0
        if joined > 2 * len(whole):
            raise IndexError  # the pieces overlap too often
        yield pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


def _number(table: memoryview, at: int, length: int) -> int:
    if at + length > len(table):
        raise IndexError
    return int.from_bytes(table[at : at + length], "big")


def _sequence_size(stream: memoryview) -> tuple[int, int]:
    """The size in the sequence header. Raises IndexError or ValueError if `stream` is no AV1 stream."""
    at = 0
    for _ in range(MOST_UNITS):
        head = stream[at]
        if head & 0x80 or not head & 2:
            raise ValueError("a unit without its size")
        at += 2 if head & 4 else 1
        length, at = _leb128(stream, at)
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            return _frame_size(_Bits(stream[at : at + length]))
        at += length
    raise ValueError("no sequence header")


def _leb128(stream: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for index in range(8):
        value |= (stream[at + index] & 0x7F) << 7 * index
        if not stream[at + index] & 0x80:
            return value, at + index + 1
    raise ValueError("a size of more than eight bytes")


class _Bits:
    """Reads numbers of bits, the most significant bit first. Raises IndexError after the end."""

    def __init__(self, content: memoryview) -> None:
        self._value = int.from_bytes(content[:1024], "big")
        self._left = 8 * min(len(content), 1024)

    def __call__(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & ((1 << count) - 1)


def _frame_size(bits: _Bits) -> tuple[int, int]:
    """The largest width and height of frames, from a sequence header (AV1, 5.5.1)."""
    bits(4)
    if bits(1):  # a still picture with a short header
        bits(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    return bits(width_bits) + 1, bits(height_bits) + 1


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits(1):  # timing
        bits(64)
        if bits(1):
            _skip_uvlc(bits)
        if bits(1):  # model of a decoder
            delay_bits = bits(5) + 1
            bits(42)
    delays = bits(1)
    for _ in range(bits(5) + 1):
        bits(12)
        if bits(5) > 7:
            bits(1)
        if delay_bits and bits(1):
            bits(2 * delay_bits + 1)
        if delays and bits(1):
            bits(4)


def _skip_uvlc(bits: _Bits) -> None:
    zeros = 0
    while not bits(1):
        zeros += 1
    bits(zeros if zeros < 32 else 0)
