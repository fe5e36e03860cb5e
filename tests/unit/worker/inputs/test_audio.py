"""Recordings: every container gives the same tone at the model's rate, and a damaged, cut or hostile one is refused by code."""

from __future__ import annotations

import io
import random
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet_workers.inputs.sound.recordings import Samples, decode_audio
from pipefleet_workers.inputs.sound.tracks import sound_frame
from pipefleet_workers.items import Blob, ItemError

RATE = 16_000
TONE = 440.0
SECONDS = 2.0
STEREO = np.sqrt(2)
"""What `ffmpeg -ac 1` makes of two equal channels: each counts half its power."""


def tone(rate: int, channels: int = 1, seconds: float = SECONDS) -> NDArray[np.float32]:
    times = np.arange(int(seconds * rate)) / rate
    wave = (0.5 * np.sin(2 * np.pi * TONE * times)).astype(np.float32)
    return np.stack([wave] * channels, axis=1) if channels > 1 else wave


def by_soundfile(form: str, subtype: str | None = None, rate: int = RATE, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(rate, channels), rate, format=form, subtype=subtype)
    return buffer.getvalue()


def noise(form: str, subtype: str | None = None, seconds: int = 20) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 1, format=form, subtype=subtype) as file:
        for second in range(seconds):  # libsndfile cannot write much of Ogg at once
            file.write(np.random.default_rng(second).normal(0, 0.1, RATE).astype(np.float32))
    return buffer.getvalue()


def case(name: str) -> bytes:
    """One of tests/cases."""
    return (Path(__file__).parents[3] / "cases" / name).read_bytes()


def by_av(
    form: str, codec: str, *, rate: int = 48_000, layout: str = "mono", options: dict[str, str] | None = None
) -> bytes:
    with tempfile.NamedTemporaryFile() as file:  # FFmpeg opens it again to move the index to the front
        _encode(file.name, form, codec, rate=rate, layout=layout, options=options or {})
        return file.read()


def _encode(path: str, form: str, codec: str, *, rate: int, layout: str, options: dict[str, str]) -> None:
    with av.open(path, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        samples = np.ascontiguousarray(np.atleast_2d(tone(rate, 2 if layout == "stereo" else 1).T).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate, frame_size=size)
        for piece in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(piece))


def decode(
    content: bytes, *, kind: str | None = None, max_seconds: float = 60.0, rate: int = RATE, **options: Any
) -> Samples:
    return decode_audio(Blob("s3://bucket/key", content, kind), rate=rate, max_seconds=max_seconds, **options)


def refusal(content: bytes, **options: Any) -> str:
    with pytest.raises(ItemError) as caught:
        decode(content, **options)
    assert caught.value.failure.stage == "decode"
    assert "s3://bucket/key" in caught.value.failure.message
    return caught.value.failure.code


FILES: dict[str, Callable[[], bytes]] = {
    "wav": lambda: by_soundfile("WAV"),
    "wav 8 bit": lambda: by_soundfile("WAV", "PCM_U8"),
    "wav 24 bit": lambda: by_soundfile("WAV", "PCM_24"),
    "wav float": lambda: by_soundfile("WAV", "FLOAT"),
    "wav stereo 44.1 kHz": lambda: by_soundfile("WAV", rate=44_100, channels=2),
    "wav 8 kHz": lambda: by_soundfile("WAV", rate=8_000),
    "wav by FFmpeg": lambda: by_av("wav", "pcm_s16le"),
    "flac": lambda: by_soundfile("FLAC"),
    "flac stereo 44.1 kHz": lambda: by_soundfile("FLAC", rate=44_100, channels=2),
    "mp3": lambda: by_soundfile("MP3", rate=44_100),
    "mp3 by FFmpeg, stereo": lambda: by_av("mp3", "libmp3lame", layout="stereo"),
    "ogg vorbis": lambda: by_soundfile("OGG", "VORBIS", rate=44_100),
    "ogg opus": lambda: by_soundfile("OGG", "OPUS", rate=48_000),
    "ogg opus by FFmpeg": lambda: by_av("ogg", "libopus"),
    "m4a": lambda: by_av("mp4", "aac", rate=44_100),
    "m4a in fragments": lambda: by_av("mp4", "aac", options={"movflags": "frag_keyframe+empty_moov"}),
    "aac": lambda: by_av("adts", "aac"),
    "webm": lambda: by_av("webm", "libopus"),
    "matroska": lambda: by_av("matroska", "libopus"),
    "aiff": lambda: by_soundfile("AIFF"),
    "m4a for the web": lambda: by_av("mp4", "aac", options={"movflags": "faststart"}),
    "webm as browsers record it": lambda: by_av("webm", "libopus", options={"live": "1"}),
    "webm stereo": lambda: by_av("webm", "libopus", layout="stereo"),
    "w64": lambda: by_soundfile("W64"),
    "rf64": lambda: by_soundfile("RF64"),
    "caf": lambda: by_soundfile("CAF"),
    "au": lambda: by_soundfile("AU"),
}
SELF_CONTAINED = [name for name in FILES if name != "aac"]
"""Containers that say how long they are, or that break when they are cut."""
SAY_NO_LENGTH = ["ogg vorbis", "ogg opus", "ogg opus by FFmpeg", "webm as browsers record it"]
LONG: dict[str, Callable[[], bytes]] = {
    "ogg vorbis": lambda: noise("OGG", "VORBIS"),
    "ogg opus": lambda: case("eos_flag_clear.opus"),
    "webm as browsers record it": FILES["webm as browsers record it"],
}
"""Recordings of several pages or clusters that say no length."""
TOLD_BY_HEADER = [
    "wav",
    "mp3",
    "ogg vorbis",
    "ogg opus",
    "m4a for the web",
    "webm",
    "webm as browsers record it",
    "matroska",
    "aiff",
    "w64",
    "rf64",
    "caf",
    "au",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_the_tone_comes_out_whole_at_the_rate_of_the_model(name: str, rate: int) -> None:
    samples = decode(FILES[name](), rate=rate)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) / rate == pytest.approx(SECONDS, abs=0.06)
    middle = samples[rate // 2 : rate // 2 + rate]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(rate)))
    assert np.argmax(spectrum) == pytest.approx(TONE, abs=2)
    assert middle.std() * np.sqrt(2) == pytest.approx(0.5 * (STEREO if "stereo" in name else 1), rel=0.1)


def test_samples_at_the_rate_of_the_model_are_untouched() -> None:
    assert np.array_equal(decode(by_soundfile("WAV", "FLOAT")), tone(RATE))
    assert np.array_equal(decode(tone(RATE).astype("<f4").tobytes(), kind=RAW_AUDIO), tone(RATE))


def test_bare_samples_must_be_whole() -> None:
    with pytest.raises(ItemError) as caught:
        decode(b"\0" * 10, kind=RAW_AUDIO)
    assert caught.value.failure.code == "bad_media"


@pytest.mark.parametrize("name", SELF_CONTAINED)
@pytest.mark.parametrize("kept", [0.1, 0.25, 0.5, 0.85])
def test_a_file_of_which_much_is_missing_is_refused(name: str, kept: float) -> None:
    content = FILES[name]()
    cut = content[: int(len(content) * kept)]
    assert refusal(cut, strict=True) in ("truncated_media", "bad_media")
    if name not in SAY_NO_LENGTH:
        assert refusal(cut) in ("truncated_media", "bad_media")


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_file_that_says_no_length_is_taken_as_far_as_it_goes_with_a_warning(name: str, kept: float) -> None:
    content, warnings = LONG[name](), list[str]()
    whole, cut = decode(content), decode(content[: int(len(content) * kept)], warnings=warnings)
    assert len(cut) == pytest.approx(kept * len(whole), rel=0.15)
    assert len(warnings) == 1
    assert warnings[0].startswith("s3://bucket/key ends too early: ")


@pytest.mark.parametrize("name", TOLD_BY_HEADER)
@pytest.mark.parametrize("missing", [1, 2])
def test_even_a_missing_byte_is_told(name: str, missing: int) -> None:
    content, warnings = FILES[name]()[:-missing], list[str]()
    assert refusal(content, strict=True) == "truncated_media"
    if name.startswith("ogg"):  # FFmpeg drops the page that is cut, which may be the only one
        return
    assert len(decode(content, warnings=warnings)) == pytest.approx(SECONDS * RATE, rel=0.05)
    assert "ends too early" in warnings[0]


@pytest.mark.parametrize("name", TOLD_BY_HEADER)
@pytest.mark.parametrize("junk", [b"\0", bytes(100), b"junk that somebody left"])
def test_bytes_behind_the_end_do_no_harm(name: str, junk: bytes) -> None:
    if not (name.startswith("ogg") or name == "webm as browsers record it"):
        assert len(decode(FILES[name]() + junk)) == pytest.approx(SECONDS * RATE, rel=0.03)


def _id3(body: bytes) -> bytes:
    """An ID3v2.3 tag with one private frame."""
    frame = b"PRIV" + struct.pack(">I", len(body)) + b"\0\0" + body
    return b"ID3\x03\0\0" + bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0)) + frame


@pytest.mark.parametrize("missing", [1, 500, 1500])
@pytest.mark.parametrize("tag", [0, 300, 20_000])
def test_an_mp3_behind_tags_that_was_cut_short_is_refused(tag: int, missing: int) -> None:
    content = _id3(b"\x01" * tag) * 2 + FILES["mp3"]()
    assert len(decode(content)) == SECONDS * RATE
    assert refusal(content[:-missing], strict=True) == "truncated_media"
    assert refusal(content[: tag + 15]) == "truncated_media"


def test_an_mp3_whose_tag_mentions_xing_is_no_truncated_file() -> None:
    content = _id3(b"Xing\0\0\0\x03\0\0\0\0\x7f\xff\xff\xff") + FILES["mp3"]()
    assert len(decode(content)) == SECONDS * RATE


def test_a_cut_file_says_what_is_missing() -> None:
    with pytest.raises(ItemError, match="10000 bytes of samples are missing"):
        decode(by_soundfile("WAV")[:-10_000])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"RIFF",
        b"OggS",
        b"fLaC",
        b"ID3",
        b"\xff\xfb",
        b"hello, this is a text\n" * 50,
        b"<html></html>",
        bytes(4096),
    ],
)
def test_what_is_no_recording_is_refused(content: bytes) -> None:
    assert refusal(content) in ("bad_media", "truncated_media")


def test_a_file_without_samples_is_refused() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0, np.float32), RATE, format="WAV")
    assert refusal(buffer.getvalue()) in ("bad_media", "truncated_media")


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile '{path}'\n",
        "ffconcat version 1.0\nfile {path}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{path}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{path}\n#EXT-X-ENDLIST\n",
        "[playlist]\nFile1={path}\n",
        "concat:{path}|{path}",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    ],
)
def test_a_playlist_opens_no_other_file(playlist: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(by_soundfile("WAV"))
    assert refusal(playlist.format(path=secret).encode()) == "bad_media"


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "ogg opus", "m4a", "webm"])
def test_a_recording_longer_than_the_bound_is_refused(name: str) -> None:
    assert refusal(FILES[name](), max_seconds=1.0) == "too_large"
    assert len(decode(FILES[name](), max_seconds=3.0))


def test_bare_samples_longer_than_the_bound_are_refused() -> None:
    with pytest.raises(ItemError) as caught:
        decode(tone(RATE).tobytes(), kind=RAW_AUDIO, max_seconds=1.0)
    assert caught.value.failure.code == "too_large"


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_recorder_that_streams_need_not_know_the_size(size: int) -> None:
    content = bytearray(by_soundfile("WAV"))
    at = content.find(b"data") + 4
    content[at : at + 4] = struct.pack("<I", size)
    assert np.array_equal(decode(bytes(content)), decode(by_soundfile("WAV")))


def test_a_flac_that_was_streamed_need_not_know_its_length() -> None:
    content = bytearray(by_soundfile("FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert np.array_equal(decode(bytes(content)), decode(by_soundfile("FLAC")))


@pytest.mark.parametrize("rate", [1, 999, 2_000_000_000])
def test_a_sampling_rate_beyond_belief_is_refused(rate: int) -> None:
    content = bytearray(by_soundfile("WAV"))
    content[24:28] = struct.pack("<I", rate)
    assert refusal(bytes(content), max_seconds=1e9) == "bad_media"


@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_blocks_leave_no_seams(rate: int) -> None:
    samples = np.random.default_rng(3).normal(0, 0.1, (20 * rate, 2)).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    swresample, frame = av.AudioResampler("flt", "mono", RATE), sound_frame(samples, rate, "stereo")
    whole = np.concatenate([one.to_ndarray()[0] for given in (frame, None) for one in swresample.resample(given)])
    assert len(whole) == 20 * RATE
    assert np.array_equal(decode(buffer.getvalue()), whole)


def test_a_long_recording_never_lies_in_memory_in_full() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((600 * 48_000, 2), np.int16), 48_000, format="FLAC")
    tracemalloc.start()
    try:
        samples = decode(buffer.getvalue(), max_seconds=601.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert samples.nbytes == 600 * RATE * 4
    assert peak < 3 * samples.nbytes


@pytest.mark.parametrize("name", FILES)
def test_damage_never_raises_anything_but_a_refusal(name: str) -> None:
    content, rng = FILES[name](), random.Random(name)
    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            damaged[rng.randrange(min(len(content), rng.choice((64, 512, len(content)))))] = rng.randrange(256)
        try:
            code = "" if decode(bytes(damaged)).size else "nothing"
        except ItemError as error:
            code = error.failure.code
        assert code in ("", "bad_media", "truncated_media", "too_large")
