"""Recordings: bytes to mono float32 samples at the model's rate. libsndfile first, FFmpeg (PyAV) for what it cannot open.

Both decode a file that was cut short to a short clip without a word, so its container is looked at first (see `containers`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from pipefleet.uploads import RAW_AUDIO
from pipefleet_workers.items import Blob, ItemError, OutgrownError
from pipefleet_workers.media.containers import truncation
from pipefleet_workers.media.declared import SAMPLE
from pipefleet_workers.media.formats import AUDIO_FORMATS

STAGE = "decode"
_RATES = (1_000, 1_000_000)
"""Sampling rates in Hz that are believed. Beyond them a small file becomes gigabytes, and soxr crashes."""
_BLOCK = 1 << 18
"""Numbers that are decoded at once; libsndfile allows 1024 channels."""
_UNKNOWN_FRAMES = (1 << 63) - 1
"""libsndfile's length of a FLAC that was streamed; it cannot read it, FFmpeg can."""

Samples = NDArray[np.float32]


def decode_audio(blob: Blob, *, rate: int, max_seconds: float, most_bytes: int | None = None) -> Samples:
    """One-dimensional samples at `rate` Hz, the mean of the channels. Raises ItemError: bad_media, truncated_media, too_large.

    A recording that needs more than `most_bytes` of the budget, whatever its header declares, is only counted to its end; then
    OutgrownError says how many.
    """
    bounds = _Bounds(blob.uri, rate, max_seconds, most_bytes)
    samples = _raw(blob, bounds) if blob.type == RAW_AUDIO else _from_file(blob, bounds)
    if not np.isfinite(samples).all():  # models answer these too, with whatever NaN leads to
        raise ItemError("bad_media", f"{blob.uri} holds samples that are not finite numbers", STAGE)
    return samples


def _from_file(blob: Blob, bounds: _Bounds) -> Samples:
    missing = truncation(blob.content)
    if missing:
        raise ItemError("truncated_media", f"{blob.uri} ends too early: {missing}", STAGE)
    try:
        samples = _soundfile(blob, bounds)
    except soundfile.LibsndfileError:
        samples = np.zeros(0, np.float32)
    if not samples.size:  # libsndfile takes the size 0 of a streamed WAV at its word
        samples = _ffmpeg(blob, bounds)
    if not samples.size:
        raise ItemError("bad_media", f"{blob.uri} holds no audio", STAGE)
    return samples


@dataclass(frozen=True, slots=True)
class _Bounds:
    uri: str
    rate: int
    """Hz that the model wants."""
    max_seconds: float
    most_bytes: int | None = None
    """Bytes of the budget that it may take, where it may not take all."""

    def check(self, seconds: float) -> None:
        if seconds > self.max_seconds:
            text = f"{self.uri} lasts {seconds:.0f} s, above the bound of {self.max_seconds:.0f} s"
            raise ItemError("too_large", text, STAGE)


class _Track:
    """Blocks as they are decoded: downmixed and resampled one by one, so that a long recording never lies here in full."""

    def __init__(self, bounds: _Bounds, rate: int) -> None:
        if not _RATES[0] <= rate <= _RATES[1]:
            raise ItemError("bad_media", f"{bounds.uri} has a sampling rate of {rate} Hz", STAGE)
        self._bounds = bounds
        self._rate = rate
        self._frames = 0
        self._pieces: list[Samples] = []
        self._outgrown = False
        same = rate == bounds.rate
        self._stream = None if same else soxr.ResampleStream(rate, bounds.rate, 1, dtype="float32", quality="HQ")

    def add(self, block: Samples) -> None:
        """Take a block of shape (frames, channels)."""
        self._frames += len(block)
        self._bounds.check(self._frames / self._rate)
        if not self._outgrown and self._bounds.most_bytes is not None and self._bytes() > self._bounds.most_bytes:
            self._outgrown = True
            self._pieces.clear()
        if not self._outgrown:
            self._append(block.mean(axis=1, dtype=np.float32), last=False)

    def end(self) -> Samples:
        """All samples at the model's rate. Raises OutgrownError."""
        if self._outgrown:
            text = f"{self._bounds.uri} lasts {self._frames / self._rate:.0f} s, longer than it declares"
            raise OutgrownError(text, STAGE, self._bytes())
        self._append(np.zeros(0, np.float32), last=True)
        return np.concatenate(self._pieces)

    def _bytes(self) -> int:
        return int(self._frames * self._bounds.rate / self._rate * SAMPLE)

    def _append(self, samples: Samples, *, last: bool) -> None:
        self._pieces.append(self._stream.resample_chunk(samples, last=last) if self._stream else samples)


def _raw(blob: Blob, bounds: _Bounds) -> Samples:
    if len(blob.content) % 4:
        raise ItemError("bad_media", f"{blob.uri} is not a whole number of float32 samples", STAGE)
    bounds.check(len(blob.content) / 4 / bounds.rate)
    return np.frombuffer(blob.content, dtype="<f4").astype(np.float32)


def _soundfile(blob: Blob, bounds: _Bounds) -> Samples:
    with soundfile.SoundFile(io.BytesIO(blob.content)) as file:
        track = _Track(bounds, file.samplerate)
        if file.frames != _UNKNOWN_FRAMES:
            bounds.check(file.frames / file.samplerate)
        while len(block := file.read(_BLOCK // file.channels, dtype="float32", always_2d=True)):
            track.add(block)
        return track.end()


def _ffmpeg(blob: Blob, bounds: _Bounds) -> Samples:
    try:
        with av.open(io.BytesIO(blob.content), "r", options={"format_whitelist": AUDIO_FORMATS}) as container:
            if not container.streams.audio:
                raise ItemError("bad_media", f"{blob.uri} has no audio track", STAGE)
            return _decoded(container, bounds)
    except av.error.EOFError:
        raise ItemError("truncated_media", f"{blob.uri} ends too early", STAGE) from None
    except (av.error.FFmpegError, ValueError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise ItemError("bad_media", f"{blob.uri} cannot be read as audio: {cause}", STAGE) from None


def _decoded(container: av.container.InputContainer, bounds: _Bounds) -> Samples:
    # Rate and channels stay: FFmpeg's own downmix is louder than the mean of the channels.
    converter, track = av.AudioResampler(format="fltp"), None
    for frame in container.decode(audio=0):
        track = track or _Track(bounds, frame.sample_rate)
        for piece in converter.resample(frame):
            track.add(piece.to_ndarray().T.astype(np.float32, copy=False))
    return track.end() if track else np.zeros(0, np.float32)
