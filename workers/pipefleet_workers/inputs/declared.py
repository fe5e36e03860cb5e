"""The decoded size of an object, as its own header declares it. `Decoder.weigh` asks for it before anything is decoded.

A header may lie, so this size only decides when an object is decoded. A recording that is longer than declared is decoded again
when there is room for all of it. The bounds of the decoder itself are in the settings. Nothing here raises.
"""

from __future__ import annotations

import io
import struct

import av
import soundfile
from PIL import Image

from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet_workers.inputs.formats import AUDIO_FORMATS, PICTURE_FORMATS, VIDEO_FORMATS
from pipefleet_workers.inputs.pictures import avif, jpeg2000
from pipefleet_workers.inputs.pictures.inner import ICON, inner
from pipefleet_workers.inputs.sound.mpeg import is_mpeg, mpeg_seconds
from pipefleet_workers.items import Blob

PIXEL = 18
"""Bytes of a pixel: 4 in Pillow's memory, 14 for the copies that an image processor makes before the picture is small."""
SAMPLE = 16
"""Bytes of a sample, four float32 copies: decoded, while blocks are joined, in the feature extractor, in overlapping pieces."""
CHARACTER = 600
"""Most bytes that a tokenizer takes for a character of a text."""
_PACKED = 32
"""Bytes of sound for each byte of a file without a declared length."""
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_OLD_BITMAP = 12
_BITMAPS = tuple(struct.pack("<I", size) for size in (_OLD_BITMAP, 40, 52, 56, 64, 108, 124))
_FRAMES_OF_JPEG = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})


def picture_bytes(content: bytes) -> int:
    """Bytes of a picture; 0 if it is no picture."""
    found = coded_pixels(content)
    if not found or not content.startswith((_JPEG, _PNG)):  # their headers suffice; Pillow takes a dozen times as long
        found = max(found, _opened(content))
    return found * PIXEL


def coded_pixels(content: bytes, held: bytes | None = None) -> int:
    """Pixels by the header of the coded stream in `content`, or in its inner file `held`; 0 if only Pillow can read the header."""
    held = inner(content) if held is None else held
    sizes = [_coded(one) for one in ((content, held) if held else (content,))]
    return max(width * height for width, height in sizes)


def recording_bytes(blob: Blob, rate: int, max_seconds: float) -> int:
    """Bytes of a recording at `rate` Hz, cut at `max_seconds`; estimated from the file's size if it declares no length."""
    if blob.type == RAW_AUDIO:
        return len(blob.content) // 4 * SAMPLE
    seconds = _seconds(blob.content)
    if seconds is None:
        return min(len(blob.content) * _PACKED, int(max_seconds * rate * SAMPLE))
    return max(1, int(min(seconds, max_seconds) * rate * SAMPLE))


def film_bytes(content: bytes, frames: int, max_pixels: int) -> int:
    """Bytes of `frames` frames of a film and of their stack, with at most `max_pixels` pixels; 0 if it is no film."""
    try:
        with av.open(io.BytesIO(content), "r", options={"format_whitelist": VIDEO_FORMATS}) as container:
            stream = container.streams.video[0]
            pixels = stream.codec_context.width * stream.codec_context.height
            return 6 * min(frames * pixels, max_pixels)
    except (av.FFmpegError, ValueError, IndexError, AttributeError):
        return 0


def _seconds(content: bytes) -> float | None:
    if is_mpeg(content):
        return mpeg_seconds(content) or _container_seconds(content)
    try:
        found = soundfile.info(io.BytesIO(content))
    except soundfile.LibsndfileError:
        return _container_seconds(content)
    if 0 < found.frames < 1 << 62 and found.samplerate > 0:
        return float(found.frames / found.samplerate)
    return _container_seconds(content)  # FFmpeg counts the bytes of a WAV that declares the size 0


def _container_seconds(content: bytes) -> float | None:
    try:
        with av.open(io.BytesIO(content), "r", options={"format_whitelist": AUDIO_FORMATS}) as container:
            return container.duration / av.time_base if container.duration else None
    except (av.FFmpegError, ValueError):
        return None


def _jpeg(content: bytes) -> tuple[int, int] | None:
    """Width and height from the frame's header; None if it is not found at once. Pillow takes a dozen times as long."""
    at = 2
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker in _FRAMES_OF_JPEG:
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def _png(content: bytes) -> tuple[int, int] | None:
    return struct.unpack_from(">II", content, 16) if content[12:16] == b"IHDR" and len(content) >= 24 else None


def _coded(content: bytes) -> tuple[int, int]:
    """The size that a stream declares, for formats whose container declares a size too; 0, 0 for other formats."""
    if jpeg2000.is_jpeg2000(content):
        return jpeg2000.size(content)
    if avif.is_avif(content):
        return avif.size(content)
    if content.startswith(_PNG):
        return _png(content) or (0, 0)
    if content.startswith(_JPEG):
        return _jpeg(content) or (0, 0)
    return _bitmap(content)


def _bitmap(content: bytes) -> tuple[int, int]:
    """The size of a bare bitmap inside an icon; twice as high as the picture, since its mask is below it."""
    if len(content) < 16 or content[:4] not in _BITMAPS:
        return 0, 0
    if content[0] == _OLD_BITMAP:
        return struct.unpack_from("<HH", content, 4)
    width, height = struct.unpack_from("<ii", content, 4)
    return abs(width), abs(height)


def _opened(content: bytes) -> int:
    if content.startswith(ICON):  # Pillow would decode it when it opens it
        return 0
    try:
        width, height = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS).size
    except Exception:  # noqa: BLE001 - decoding reports the fault
        return 0
    return width * height
