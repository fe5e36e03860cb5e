"""Recordings: bytes to mono float32 samples at the model's rate. libsndfile first, FFmpeg (PyAV) for what it cannot open.

Both decode a file that was cut short to a short clip without a word, so the containers are checked for their end as well.
"""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from pipefleet.inputs import RAW_AUDIO
from pipefleet_workers.items import Blob, ItemError

STAGE = "decode"
_FORMATS = "mov,matroska,webm,avi,mpegts,wav,mp3,flac,ogg,aac,aiff,amr,caf,asf"
"""Demuxers that FFmpeg may choose. Playlist formats (concat, hls) would open other files."""
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
_XING_AHEAD = 4096

Samples = NDArray[np.float32]


def decode_audio(blob: Blob, *, rate: int, max_seconds: float) -> Samples:
    """One-dimensional samples at `rate` Hz. Raises ItemError: bad_media, truncated_media, too_large."""
    if blob.type == RAW_AUDIO:
        return _raw(blob, rate, max_seconds)
    truncation = _truncated(blob.content)
    if truncation:
        raise ItemError("truncated_media", f"{blob.uri} ends too early: {truncation}", STAGE)
    try:
        samples, found = _soundfile(blob, max_seconds)
    except soundfile.LibsndfileError:
        samples, found = _ffmpeg(blob, rate, max_seconds)
    if not samples.size:
        raise ItemError("bad_media", f"{blob.uri} holds no audio", STAGE)
    return samples if found == rate else soxr.resample(samples, found, rate, quality="HQ")


def _raw(blob: Blob, rate: int, max_seconds: float) -> Samples:
    if len(blob.content) % 4:
        raise ItemError("bad_media", f"{blob.uri} is not a whole number of float32 samples", STAGE)
    samples = np.frombuffer(blob.content, dtype="<f4").astype(np.float32)
    _check_seconds(blob, len(samples) / rate, max_seconds)
    return samples


def _soundfile(blob: Blob, max_seconds: float) -> tuple[Samples, int]:
    with soundfile.SoundFile(io.BytesIO(blob.content)) as file:
        _check_seconds(blob, file.frames / file.samplerate, max_seconds)
        frames = int(max_seconds * file.samplerate)
        samples = file.read(frames, dtype="float32", always_2d=True)
        return samples.mean(axis=1, dtype=np.float32), file.samplerate


def _ffmpeg(blob: Blob, rate: int, max_seconds: float) -> tuple[Samples, int]:
    pieces: list[Samples] = []
    count = 0
    try:
        with av.open(io.BytesIO(blob.content), "r", options={"format_whitelist": _FORMATS}) as container:
            if not container.streams.audio:
                raise ItemError("bad_media", f"{blob.uri} has no audio track", STAGE)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            for frame in container.decode(audio=0):
                for piece in resampler.resample(frame):
                    pieces.append(piece.to_ndarray()[0])
                    count += pieces[-1].size
                _check_seconds(blob, count / rate, max_seconds)
            pieces.extend(piece.to_ndarray()[0] for piece in resampler.resample(None))
    except av.error.EOFError:
        raise ItemError("truncated_media", f"{blob.uri} ends too early", STAGE) from None
    except (av.error.FFmpegError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise ItemError("bad_media", f"{blob.uri} cannot be read as audio: {cause}", STAGE) from None
    return np.concatenate(pieces) if pieces else np.zeros(0, np.float32), rate


def _check_seconds(blob: Blob, seconds: float, most: float) -> None:
    if seconds > most:
        raise ItemError("too_large", f"{blob.uri} lasts {seconds:.0f} s, above the bound of {most:.0f} s", STAGE)


def _truncated(content: bytes) -> str | None:
    """Why a wav, ogg or mp3 file is shorter than it says, or None. Other containers fail while they are decoded."""
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return _truncated_wav(content)
    if content[:4] == b"OggS":
        return _truncated_ogg(content)
    return _truncated_mp3(content)


def _truncated_wav(content: bytes) -> str | None:
    at = 12
    while at + 8 <= len(content):
        name, size = content[at : at + 4], struct.unpack_from("<I", content, at + 4)[0]
        if name == b"data":
            # Recorders that stream write 0 or the largest number there.
            missing = at + 8 + size - len(content)
            return f"{missing} bytes of samples are missing" if size not in _UNKNOWN_SIZES and missing > 0 else None
        at += 8 + size + size % 2
    return "it has no samples"


def _truncated_ogg(content: bytes) -> str | None:
    """The last page of an Ogg stream carries the end-of-stream flag (RFC 3533, section 6)."""
    at = content.rfind(b"OggS")
    if at + 27 > len(content):
        return "the last page is cut"
    segments = content[at + 26]
    table = content[at + 27 : at + 27 + segments]
    end = at + 27 + segments + sum(table)
    if len(table) < segments or end > len(content):
        return "the last page is cut"
    return None if content[at + 5] & 4 else "the end of the stream is missing"


def _truncated_mp3(content: bytes) -> str | None:
    """Encoders write the number of bytes into the first frame (the Xing or Info tag), where there is one."""
    head = content[:_XING_AHEAD]
    at = max(head.find(b"Xing"), head.find(b"Info"))
    if content[:3] != b"ID3" and content[:1] != b"\xff":
        return None
    if at < 0 or at + 16 > len(content):
        return None
    flags = struct.unpack_from(">I", content, at + 4)[0]
    if flags & 3 != 3:
        return None
    size = struct.unpack_from(">I", content, at + 12)[0]
    missing = size - len(content)
    return f"{missing} bytes are missing" if missing > 0 else None
