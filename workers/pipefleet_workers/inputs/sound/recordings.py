"""Recordings: from bytes to mono float32 samples at the model's rate, as transformers' own decoding by FFmpeg gives them.

    bytes ─▶ plain_wav, or parts (joined) ─▶ FFmpeg, else libsndfile ─▶ Track (mix, resample) ─▶ samples and warnings

`Decoder` calls `decode_audio`. FFmpeg (PyAV) decodes to the end of the data, whatever a header declares; libsndfile reads the few
kinds that FFmpeg does not open. A packet that cannot be decoded is left out. Missing parts of a recording become warnings, or
refuse it: `containers` decides for a missing end, `strict` refuses for both.
"""

from __future__ import annotations

import io

import numpy as np
import soundfile

from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet_workers.inputs.containers import MOST_MISSING, Missing, flac_seconds, missing_of
from pipefleet_workers.inputs.losses import Losses, note
from pipefleet_workers.inputs.sound.ffmpeg import CannotOpenError, read_sound
from pipefleet_workers.inputs.sound.mpeg import is_mpeg
from pipefleet_workers.inputs.sound.pages import lost_pages
from pipefleet_workers.inputs.sound.plain_wav import plain_samples
from pipefleet_workers.inputs.sound.tracks import STAGE, Bounds, Samples, Track, sound_frame
from pipefleet_workers.items import Blob, ItemError

__all__ = ["Samples", "decode_audio"]
_BLOCK = 1 << 18
"""Numbers that libsndfile decodes at once; it allows 1024 channels."""


def decode_audio(
    blob: Blob,
    *,
    rate: int,
    max_seconds: float,
    most_bytes: int | None = None,
    strict: bool = False,
    warnings: list[str] | None = None,
) -> Samples:
    """One-dimensional samples at `rate` Hz. Raises ItemError: bad_media, truncated_media, too_large.

    A recording that needs more than `most_bytes` of the budget is only counted to its end; OutgrownError then carries its bytes.
    Sentences on missing parts are added to `warnings`; with `strict`, a missing part refuses the recording.
    """
    bounds = Bounds(blob.uri, rate, max_seconds, most_bytes)
    notes: list[str] = []
    samples = _raw(blob, bounds) if blob.type == RAW_AUDIO else _from_file(blob, bounds, notes, strict=strict)
    if not np.isfinite(samples).all():  # models would turn NaN into some result
        raise ItemError("bad_media", f"{blob.uri} holds samples that are not finite numbers", STAGE)
    if warnings is not None:
        for text in notes:
            note(warnings, text)
    return samples


def _from_file(blob: Blob, bounds: Bounds, notes: list[str], *, strict: bool) -> Samples:
    missing = missing_of(blob.content)
    if missing and (strict or missing.share > MOST_MISSING):
        raise _truncated(blob, missing)
    track, losses = Track(bounds), Losses(pages=lost_pages(blob.content))
    samples = _decoded(blob, track, losses)
    if not samples.size:
        raise _truncated(blob, missing) if missing else ItemError("bad_media", f"{blob.uri} holds no audio", STAGE)
    missing = missing or _shortfall(blob.content, track.seconds)
    if missing and (strict or missing.share > MOST_MISSING):
        raise _truncated(blob, missing)
    if missing:
        notes.append(f"{blob.uri} ends too early: {missing.text}")
    if losses.text:
        if strict:
            raise ItemError("bad_media", f"{blob.uri} is damaged: {losses.text}", STAGE)
        notes.append(f"{blob.uri} is damaged: {losses.text}; the result is of the rest")
    return samples


def _truncated(blob: Blob, missing: Missing) -> ItemError:
    return ItemError("truncated_media", f"{blob.uri} ends too early: {missing.text}", STAGE)


def _shortfall(content: bytes, seconds: float) -> Missing | None:
    """The missing part of a FLAC, which declares its number of samples, but not their bytes."""
    promised = flac_seconds(content)
    if promised is None or seconds >= promised - 0.001:
        return None
    return Missing(f"{seconds:.3f} s of {promised:.3f} s are there", 1 - seconds / promised)


def _raw(blob: Blob, bounds: Bounds) -> Samples:
    if len(blob.content) % 4:
        raise ItemError("bad_media", f"{blob.uri} is not a whole number of float32 samples", STAGE)
    bounds.check(len(blob.content) / 4 / bounds.rate)
    return np.frombuffer(blob.content, dtype="<f4").astype(np.float32)


def _decoded(blob: Blob, track: Track, losses: Losses) -> Samples:
    plain = plain_samples(blob.content, track.rate)
    if plain is not None:
        track.add_plain(plain)
        return track.end()
    try:
        return read_sound(blob, track, losses)
    except CannotOpenError as error:
        if track.seconds or is_mpeg(blob.content):  # libsndfile would print lines about MPEG audio
            raise error.refusal from None
        try:
            return _by_libsndfile(blob.content, track)
        except soundfile.LibsndfileError:
            raise error.refusal from None


def _by_libsndfile(content: bytes, track: Track) -> Samples:
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        layout = f"{file.channels} channels"  # FFmpeg knows a layout for most numbers of channels
        while len(block := file.read(_BLOCK // file.channels, dtype="float32", always_2d=True)):
            track.add(sound_frame(block, file.samplerate, layout))
        return track.end()
