"""Splits files that were joined (`cat a b`), and repairs sizes that FFmpeg does not accept.

Bytes go in; files that FFmpeg reads to their ends come out. `ffmpeg` calls `parts` for each recording.

In a joined MP3, ADTS or Ogg, FFmpeg itself goes on after the first part. It stops at a change of codec, rate or number of channels
in an Ogg, and at a picture in a tag that looks like sound. In a joined FLAC it decodes some frames twice.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterator
from itertools import islice

from pipefleet_workers.inputs.containers import FLAC_START, chunk_of, is_placeholder

_MOST_PARTS = 256
"""Most parts that are opened one by one; the last part holds all later parts."""
_MOST_PAGES = 1 << 20
"""Most pages of an Ogg that are read; an encoder's pages of this number hold hours."""
_MOST_TAGS = 1 << 14
"""Most tags of each kind that are searched. FFmpeg skips later tags, as it skips all bytes that are no sound."""
_ID3 = re.compile(rb"ID3[\x02-\x04][\x00-\x0f][\x00\x10\x20\x40\x50\x60\x80\x90\xa0\xc0\xd0\xe0][\x00-\x7f]{4}")
_APE = re.compile(rb"APETAGEX[\xd0\xe8][\x03\x07]\x00\x00")
_APE_HEAD = 32
_APE_IS_HEAD, _APE_HAS_HEAD = 1 << 29, 1 << 31
_BEHIND_TAGS = re.compile(rb"\xff[\xe0-\xff]|fLaC|ID3|TAG|APETAGEX|LYRICSBEGIN|\x00|$")
"""The bytes after a tag: a frame, another tag, padding, or the end."""


def parts(content: bytes) -> list[bytes]:
    """The files that a file consists of, in their order; most files have one part, themselves."""
    if content.startswith(b"OggS"):
        return _split(content, list(islice(_ogg_starts(content), _MOST_PARTS)))
    if content.startswith(b"RIFF"):
        return _split(content, list(islice(_wav_starts(content), _MOST_PARTS)))
    if content.startswith((b"riff", b"RF64", b"BW64")):
        return [_with_size(content)]
    if content.startswith((b"ID3", b"fLaC")) or (content[:1] == b"\xff" and content[1:2] >= b"\xe0"):
        content = _without_tags(content)
        heads = islice(FLAC_START.finditer(content), _MOST_PARTS) if content.startswith(b"fLaC") else ()
        return _split(content, [found.start() for found in heads])
    return [content]


def _split(content: bytes, starts: list[int]) -> list[bytes]:
    if len(starts) < 2:
        return [content]
    return [content[begin:end] for begin, end in zip([0, *starts[1:]], [*starts[1:], None], strict=True)]


def _wav_starts(content: bytes) -> Iterator[int]:
    """The starts of WAVs that directly follow another WAV, by their declared sizes. FFmpeg would stop after the first WAV."""
    at = 0
    while at == 0 or (content[at : at + 4] == b"RIFF" and content[at + 8 : at + 12] == b"WAVE"):
        yield at
        if len(content) < at + 8:
            return
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8 + size + size % 2


def _ogg_starts(content: bytes) -> Iterator[int]:
    """The places where codec, rate or number of channels change, by the first packet of each stream; the first place is 0."""
    before, headed = b"", False
    yield 0
    for at, is_first, head in islice(_ogg_pages(content), _MOST_PAGES):
        if is_first and not headed:
            if before and head != before:
                yield at
            before = head
        headed = is_first


def _ogg_pages(content: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """The start of each page, whether it begins a stream, and the packet of a page that does."""
    at = 0
    while (at := content.find(b"OggS", at)) >= 0 and at + 27 <= len(content):
        segments = content[at + 26]
        size = 27 + segments + sum(content[at + 27 : at + 27 + segments])
        is_first = bool(content[at + 5] & 2)
        yield at, is_first, content[at + 27 + segments : at + size] if is_first else b""
        at += size


def _without_tags(content: bytes) -> bytes:
    """The content without the tags after its beginning: FFmpeg knows tags only at both ends of a file."""
    kept, begin, seen = [], 0, 0
    tags = heapq.merge(islice(_id3_tags(content), _MOST_TAGS), islice(_ape_tags(content), _MOST_TAGS))
    for start, end in tags:
        if start < seen or not _BEHIND_TAGS.match(content, end):
            continue  # bytes inside a tag that look like another tag are part of the outer tag
        seen = end
        if start:
            kept.append(content[begin:start])
            begin = end
    return b"".join([*kept, content[begin:]]) if kept else content


def _id3_tags(content: bytes) -> Iterator[tuple[int, int]]:
    for found in _ID3.finditer(content):
        high, upper, lower, low = found[0][6:10]
        footer = 10 if found[0][5] & 0x10 else 0
        yield found.start(), found.end() + (high << 21 | upper << 14 | lower << 7 | low) + footer


def _ape_tags(content: bytes) -> Iterator[tuple[int, int]]:
    for found in _APE.finditer(content):
        if len(content) >= found.start() + _APE_HEAD:
            size, _, flags = struct.unpack_from("<III", content, found.end())
            if flags & _APE_IS_HEAD:
                yield found.start(), found.start() + _APE_HEAD + size
            elif not flags & _APE_HAS_HEAD:  # a tag with a foot alone; its size counts the foot
                yield found.start() + _APE_HEAD - size, found.start() + _APE_HEAD


def _with_size(content: bytes) -> bytes:
    """A file with 64-bit sizes whose size means "not known", with its real size."""
    if content.startswith(b"riff"):
        at, own = content.find(b"data\xf3\xac\xd3\x11") + 16, 24
        start = at + 8
    else:
        sizes = chunk_of(content, b"ds64", at=12, layout="<4sI")
        data = chunk_of(content, b"data", at=12, layout="<4sI")
        at, own, start = sizes[0] + 8 if sizes else 0, 0, data[0] if data else 0
    if at < 16 or not start or at + 8 > len(content):
        return content
    (size,) = struct.unpack_from("<Q", content, at)
    if not is_placeholder(size):
        return content
    return content[:at] + struct.pack("<Q", len(content) - start + own) + content[at + 8 :]
