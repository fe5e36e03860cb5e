"""Estimates how long MPEG audio (MP3, MP2, ADTS) lasts, by its frames in some places of the file. Nothing is decoded.

`declared` asks for the length. libsndfile is never asked about these files: it would take a cover picture for sound, ignore all but
the first of joined files, and print a line for each oddity. So `declared` and `recordings` ask `is_mpeg` first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import islice

from pipefleet_workers.inputs.containers import behind_tags

_PLACES = 64
_FRAMES = 8
"""Frames that are read in each place."""
_REACH = 2048
"""Bytes that are searched for a frame in each place; stereo frames are smaller. A place without a frame (a picture) adds 0 s."""
_MARK, _MARKS = re.compile(rb"\xff[\xe2-\xff][\x00-\xef]"), 256
"""The pattern of a frame's first bytes, and how many matches are tried in each place."""
_MARGIN = 1.125
"""Factor of an estimated length: a file that is longer than its estimate would be decoded twice."""
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_ADTS_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
_KBITS = {
    (True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""Kilobits per second, by (is MPEG 1, layer as coded in a frame: 3 is layer I)."""


def is_mpeg(content: bytes) -> bool:
    """Whether a file begins as MPEG audio does, or with a tag in front of it."""
    return content.startswith(b"ID3") or (content[:1] == b"\xff" and content[1:2] >= b"\xe0")


def mpeg_seconds(content: bytes) -> float | None:
    """About how many seconds such a file lasts; None if no frame is found."""
    begin = behind_tags(content)
    said = _said(content, begin)
    if said is not None:
        return said
    rest, seconds, found = len(content) - begin, 0.0, False
    for place in range(_PLACES):
        frames = list(_frames(content, begin + rest * place // _PLACES))
        if frames:
            found = True
            seconds += rest / _PLACES * sum(long for _, long in frames) / sum(size for size, _ in frames)
    return _MARGIN * seconds if found else None


def _said(content: bytes, at: int) -> float | None:
    """The seconds by the encoder's tag in the first frame; None without a tag, or if the tag's size is not the file's."""
    frame, head = _frame(content, at), content[at : at + 64]
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    if frame is None or tag < 0 or at + tag + 16 > len(content):
        return None
    flags, count, size = struct.unpack_from(">III", content, at + tag + 4)
    if flags & 3 != 3 or abs(len(content) - at - size) > size // 100 + 1024:
        return None
    return float(count * frame[1])


def _frames(content: bytes, at: int) -> Iterator[tuple[int, float]]:
    """Bytes and seconds of some frames from `at` on. The first is the first frame that another frame, or the end, follows."""
    for mark in islice(_MARK.finditer(content, at, at + _REACH), _MARKS):
        at = mark.start()
        frame = _frame(content, at)
        if frame and (at + frame[0] == len(content) or _frame(content, at + frame[0])):
            break
    else:
        return
    for _ in range(_FRAMES):
        if not (frame := _frame(content, at)):
            return
        yield frame
        at += frame[0]


def _frame(content: bytes, at: int) -> tuple[int, float] | None:
    """Bytes and seconds of the frame that begins at `at`; None if no frame begins there, or if it does not declare its size."""
    head = int.from_bytes(content[at : at + 4], "big")
    if head >> 21 != 0x7FF or at + 7 > len(content):
        return None
    version, layer = head >> 19 & 3, head >> 17 & 3
    if not layer:
        return _adts(content, at)
    bits, rate = head >> 12 & 15, head >> 10 & 3
    if version == 1 or bits in (0, 15) or rate == 3:
        return None
    hertz, kbits = _RATES[version][rate], _KBITS[version == 3, layer][bits - 1]
    samples = 384 if layer == 3 else 576 if layer == 1 and version != 3 else 1152
    unit = 4 if layer == 3 else 1
    return (samples // 8 * kbits * 1000 // hertz // unit + (head >> 9 & 1)) * unit, samples / hertz


def _adts(content: bytes, at: int) -> tuple[int, float] | None:
    rate = content[at + 2] >> 2 & 15
    size = int.from_bytes(content[at + 3 : at + 6], "big") >> 5 & 0x1FFF
    if content[at + 1] & 0xF6 != 0xF0 or rate >= len(_ADTS_RATES) or size < 7:
        return None
    return size, 1024 * ((content[at + 6] & 3) + 1) / _ADTS_RATES[rate]
