"""Recordings are decoded to the end of their data, as transformers' FFmpeg decodes them; what is missing is told."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from pipefleet_workers.inputs.containers import missing_of
from pipefleet_workers.inputs.declared import SAMPLE
from pipefleet_workers.inputs.losses import MOST_CHARACTERS, MOST_WARNINGS, note
from pipefleet_workers.inputs.sound.joined import parts
from pipefleet_workers.items import ItemError, OutgrownError
from tests.unit.sound_files import RATE, by_ffmpeg, by_libsndfile, case, decode, ffmpeg_read, fill, gain, tone

HIGH = 1000.0
"""Hz of the second of two tones."""


def code(content: bytes, **options: bool) -> str:
    with pytest.raises(ItemError) as caught:
        decode(content, **options)
    return caught.value.failure.code


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("vbr_piped.mp3", 20.988),
        ("chained_vorbis.ogg", 4.405),
        ("rate_change.aac", 442368 / 44_100 + 176128 / 16_000),
        ("phone_dtx.amr", 20.9),
        ("video.flv", 86_400 / 44_100),
        ("second_track_default.mkv", 86_016 / 44_100),
        ("alac.m4a", 84_584 / 44_100),
    ],
)
def test_a_recording_is_decoded_to_its_end(name: str, seconds: float) -> None:
    warnings = list[str]()
    assert len(decode(case(name), warnings=warnings)) == pytest.approx(seconds * RATE, abs=16)
    assert warnings == []
    assert len(decode(case(name), strict=True)) == pytest.approx(seconds * RATE, abs=16)


@pytest.mark.parametrize(
    "name", ["vbr_piped.mp3", "chained_vorbis.ogg", "alac.m4a", "video.flv", "eos_flag_clear.opus"]
)
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_samples_are_those_of_transformers_own_decoding(name: str, rate: int) -> None:
    assert np.array_equal(decode(case(name), rate), ffmpeg_read(case(name), rate))


def test_an_ogg_without_its_last_mark_is_taken_with_a_warning() -> None:
    warnings = list[str]()
    assert len(decode(case("eos_flag_clear.opus"), warnings=warnings)) == pytest.approx(20.9 * RATE, rel=0.01)
    assert warnings == ["s3://bucket/key ends too early: the mark of its end is missing"]
    assert code(case("eos_flag_clear.opus"), strict=True) == "truncated_media"


def test_a_packet_that_cannot_be_decoded_is_left_out_and_counted() -> None:
    warnings = list[str]()
    assert len(decode(case("damaged_middle.ts"), warnings=warnings)) == 327 * 1024
    assert warnings == ["s3://bucket/key is damaged: 1 of 328 packets could not be decoded; the result is of the rest"]
    assert code(case("damaged_middle.ts"), strict=True) == "bad_media"


def pages_of(content: bytes) -> list[bytes]:
    return [b"OggS" + one for one in content.split(b"OggS")[1:]]


@pytest.mark.parametrize("damage", ["missing", "changed"])
@pytest.mark.parametrize("form", ["opus", "vorbis"])
def test_a_page_of_an_ogg_that_is_missing_or_damaged_is_told(form: str, damage: str) -> None:
    content = (
        by_ffmpeg("ogg", "libopus", tone(48_000, 20.0), 48_000)
        if form == "opus"
        else by_libsndfile("OGG", tone(RATE, 20.0), RATE)
    )
    pages = pages_of(content)
    at = len(pages) - 2
    pages[at] = b"" if damage == "missing" else pages[at][:-1] + bytes([pages[at][-1] ^ 1])
    warnings = list[str]()
    assert len(decode(b"".join(pages), warnings=warnings)) < 19.9 * RATE
    assert warnings == ["s3://bucket/key is damaged: a page is missing or damaged; the result is of the rest"]
    assert code(b"".join(pages), strict=True) == "bad_media"


def test_a_broadcast_that_was_recorded_from_its_middle_on_lacks_no_page() -> None:
    pages = pages_of(by_ffmpeg("ogg", "libopus", tone(48_000, 6.0), 48_000))
    warnings = list[str]()
    decode(b"".join(pages[:2] + pages[3:]), warnings=warnings)
    decode(case("chained_vorbis.ogg"), warnings=warnings)
    assert warnings == []


def test_the_default_track_is_heard_else_the_one_with_most_channels() -> None:
    assert len(decode(case("second_track_default.mkv"), 44_100)) == 86_016
    tracks = (("mono", 440.0), ("stereo", HIGH), ("stereo", 440.0))
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format="mpegts") as container:
            streams = [container.add_stream("aac", rate=RATE, layout=layout) for layout, _ in tracks]
            for stream, (layout, hz) in zip(streams, tracks, strict=True):
                stream.disposition = av.stream.Disposition(0)
                sound = np.stack([tone(RATE, hz=hz)] * av.AudioLayout(layout).nb_channels, axis=1)
                fill(container, stream, sound, RATE, layout)
        content = file.read()
    assert gain(decode(content), RATE, HIGH) == pytest.approx(np.sqrt(2), rel=0.05)


# Channels

HALF, ROOT = 0.5, np.sqrt(0.5)
LAYOUTS = {
    "mono": [1.0],
    "stereo": [ROOT, ROOT],
    "2.1": [ROOT, ROOT, 0.0],
    "3.0": [ROOT, ROOT, 1.0],
    "4.0": [ROOT, ROOT, 1.0, HALF],
    "quad": [ROOT, ROOT, HALF, HALF],
    "5.0": [ROOT, ROOT, 1.0, HALF, HALF],
    "5.1": [ROOT, ROOT, 1.0, 0.0, HALF, HALF],
    "5.1(side)": [ROOT, ROOT, 1.0, 0.0, HALF, HALF],
    "6.1": [ROOT, ROOT, 1.0, 0.0, HALF, HALF, HALF],
    "7.1": [ROOT, ROOT, 1.0, 0.0, HALF, HALF, HALF, HALF],
}
"""How much of each channel is heard: swresample's matrix, in which the film's low-frequency channel is none."""
NO_SUCH_LAYOUT = {("ac3", "6.1"), ("ac3", "7.1")}


@pytest.mark.parametrize(("form", "codec"), [("wav", "pcm_s16le"), ("flac", "flac"), ("mp4", "aac"), ("ac3", "ac3")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_channel_of_a_layout_is_heard_as_swresample_weighs_it(form: str, codec: str, layout: str) -> None:
    if (codec, layout) in NO_SUCH_LAYOUT:
        return
    count = len(LAYOUTS[layout])
    tones = [250.0 * (index + 1) for index in range(count)]
    if "LFE" in [one.name for one in av.AudioLayout(layout).channels]:
        tones[[one.name for one in av.AudioLayout(layout).channels].index("LFE")] = 60.0
    sound = np.stack([tone(48_000, 0.5, hz) for hz in tones], axis=1)
    heard = decode(by_ffmpeg(form, codec, sound, 48_000, layout), 48_000)
    assert [gain(heard, 48_000, hz) for hz in tones] == pytest.approx(LAYOUTS[layout], abs=0.05)


@pytest.mark.parametrize("form", ["AIFF", "AU", "W64", "MAT5"])
@pytest.mark.parametrize("channels", [1, 2, 6, 8, 10])
def test_a_layout_sounds_the_same_from_every_container(form: str, channels: int) -> None:
    """MAT5 is read by libsndfile, the others by FFmpeg; both know layouts for most numbers of channels."""
    sound = np.stack([tone(RATE, 0.5, 250.0 * (index + 1)) for index in range(channels)], axis=1)
    found, wav = (decode(by_libsndfile(one, sound, RATE, "PCM_16")) for one in (form, "WAV"))
    assert np.allclose(found, wav, atol=1e-3)


def caf(tag: int, samples: NDArray[np.int16], labels: Sequence[int] = ()) -> bytes:
    """A CAF of samples `[samples, channels]` at 16 kHz, whose channels have the order of a tag of Apple's, or of labels."""
    channels = samples.shape[1]
    form = struct.pack(">d4sIIIII", RATE, b"lpcm", 0, 2 * channels, 1, channels, 16)
    order = struct.pack(">III", tag, 0, len(labels)) + b"".join(struct.pack(">I16x", one) for one in labels)
    chunks = ((b"desc", form), (b"chan", order), (b"data", bytes(4) + samples.astype(">i2").tobytes()))
    return b"caff\0\1\0\0" + b"".join(struct.pack(">4sq", name, len(chunk)) + chunk for name, chunk in chunks)


@pytest.mark.parametrize(
    ("tag", "labels", "gains"),
    [
        (121 << 16 | 6, (), "L R C LFE S S"),
        (122 << 16 | 6, (), "L R S S C LFE"),
        (123 << 16 | 6, (), "L C R S S LFE"),
        (124 << 16 | 6, (), "C L R S S LFE"),
        (128 << 16 | 8, (), "L R C LFE S S S S"),
        (0, (5, 6, 1, 2), "S S L R"),
        (0, (2, 1), "R L"),
    ],
)
def test_channels_in_an_order_of_their_own_are_heard_as_what_they_are(
    tag: int, labels: Sequence[int], gains: str
) -> None:
    weights = {"L": 0.5**0.5, "R": 0.5**0.5, "C": 1.0, "S": 0.5, "LFE": 0.0}
    wanted = [0.5 * weights[one] for one in gains.split()]
    silent_but_one = np.repeat(np.eye(len(wanted), dtype=np.int16) * (1 << 14), RATE // 10, axis=0)
    for _ in range(4):  # a list of channels that is freed twice ends the process sooner or later
        heard = decode(caf(tag, silent_but_one, labels))
        assert heard[RATE // 20 :: RATE // 10] == pytest.approx(wanted, abs=1e-4)


def test_channels_without_a_layout_are_heard_as_their_mean() -> None:
    sound = np.stack([tone(RATE, 0.5, 250.0 * (index + 1)) for index in range(9)], axis=1)
    for form in ("WAV", "MAT5"):
        assert np.allclose(decode(by_libsndfile(form, sound, RATE, "PCM_16")), sound.mean(axis=1), atol=1e-3)


@pytest.mark.parametrize("form", ["matroska", "mov"])
def test_a_track_without_packets_is_passed_over(form: str) -> None:
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=form) as container:
            tracks = [container.add_stream("aac", rate=RATE, layout=layout) for layout in ("5.1", "stereo")]
            container.start_encoding()
            fill(container, tracks[1], np.stack([tone(RATE)] * 2, axis=1), RATE, "stereo")
        content = file.read()
    warnings = list[str]()
    assert gain(decode(content, warnings=warnings), RATE) == pytest.approx(2**0.5, rel=0.05)
    assert warnings == []


@pytest.mark.parametrize("flags", [0, 1 << 31])
def test_a_tag_behind_the_last_frame_is_no_damage(flags: int) -> None:
    item = struct.pack("<II", 5, 0) + b"Title\0hello"
    head, foot = (b"APETAGEX" + struct.pack("<4I8x", 2000, len(item) + 32, 1, one) for one in (flags | 1 << 29, flags))
    content = by_ffmpeg("mp3", "libmp3lame", tone(RATE), RATE)
    warnings = list[str]()
    heard = decode(content + (head if flags else b"") + item + foot, warnings=warnings)
    assert np.array_equal(heard, decode(content))
    assert warnings == []


# Joined files


def _id3(body: bytes) -> bytes:
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\0\0" + body
    return b"ID3\x03\0\0" + bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0)) + frame


def two(
    form: str, codec: str, rates: tuple[int, int] = (48_000, 48_000), layouts: tuple[str, str] = ("mono", "mono")
) -> list[bytes]:
    found = []
    for rate, layout, hz in zip(rates, layouts, (440.0, HIGH), strict=True):
        sound = np.stack([tone(rate, hz=hz)] * av.AudioLayout(layout).nb_channels, axis=1)
        found.append(by_ffmpeg(form, codec, sound, rate, layout))
    return found


PNG = b"\x89PNG\r\n\x1a\n" + np.random.default_rng(1).bytes(30_000)
JOINED: dict[str, Callable[[], bytes]] = {
    "mp3": lambda: b"".join(two("mp3", "libmp3lame")),
    "mp3 of two rates": lambda: b"".join(two("mp3", "libmp3lame", (44_100, 16_000))),
    "mp3, stereo behind mono": lambda: b"".join(two("mp3", "libmp3lame", layouts=("mono", "stereo"))),
    "mp3 with a picture between": lambda: _id3(PNG).join(two("mp3", "libmp3lame")),
    "mp3 with ID3v1 and APE tags between": lambda: (
        (b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8)) + (b"TAG" + bytes(125))
    ).join(two("mp3", "libmp3lame")),
    "flac": lambda: b"".join(two("flac", "flac")),
    "flac of two rates": lambda: b"".join(two("flac", "flac", (44_100, 16_000))),
    "flac, stereo behind mono": lambda: b"".join(two("flac", "flac", layouts=("mono", "stereo"))),
    "flac with a tag between": lambda: _id3(PNG).join(two("flac", "flac")),
    "adts": lambda: b"".join(two("adts", "aac", (44_100, 16_000))),
    "adts, stereo behind mono": lambda: b"".join(two("adts", "aac", layouts=("mono", "stereo"))),
    "ogg opus": lambda: b"".join(two("ogg", "libopus")),
    "ogg opus, stereo behind mono": lambda: b"".join(two("ogg", "libopus", layouts=("mono", "stereo"))),
    "ogg vorbis": lambda: (
        by_libsndfile("OGG", tone(44_100), 44_100) + by_libsndfile("OGG", tone(44_100, hz=HIGH), 44_100)
    ),
    "ogg vorbis of two rates": lambda: (
        by_libsndfile("OGG", tone(44_100), 44_100) + by_libsndfile("OGG", tone(RATE, hz=HIGH), RATE)
    ),
    "ogg flac": lambda: b"".join(two("ogg", "flac", (48_000, 16_000))),
    "ogg of two codecs": lambda: by_libsndfile("OGG", tone(44_100), 44_100) + two("ogg", "libopus")[1],
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_files_are_heard_one_after_the_other_at_their_own_speed(name: str) -> None:
    warnings = list[str]()
    heard = decode(JOINED[name](), warnings=warnings)
    assert len(heard) == pytest.approx(4 * RATE, rel=0.04)
    first, second = heard[: 2 * RATE], heard[-2 * RATE :]
    loud = np.sqrt(2) if "stereo" in name else 1.0
    assert gain(first, RATE) == pytest.approx(1.0, rel=0.1)
    assert gain(second, RATE, HIGH) == pytest.approx(loud, rel=0.1)
    assert gain(first, RATE, HIGH) < 0.1
    assert warnings == []


def test_an_ogg_of_very_many_parts_is_split_into_some_of_them() -> None:
    part, other = (by_libsndfile("OGG", tone(rate, 0.01), rate) for rate in (44_100, RATE))
    assert len(parts((part + other) * 300)) == 256
    assert b"".join(parts((part + other) * 300)) == (part + other) * 300
    assert parts(part * 3) == [part * 3]


# Sizes that mean "not known"


def placeholder(form: str, size: int) -> bytes:
    content = bytearray(by_libsndfile(form, tone(RATE), RATE, "PCM_16"))
    name, layout, shift = {
        "WAV": (b"data", "<I", 0),
        "AIFF": (b"SSND", ">I", 0),
        "AU": (b".snd", ">I", 4),
        "CAF": (b"data", ">q", 0),
        "W64": (b"data", "<Q", 12),
    }[form]
    at = content.find(name) + len(name) + shift
    struct.pack_into(layout, content, at, size)
    return bytes(content)


@pytest.mark.parametrize(
    ("form", "size"),
    [
        *(("WAV", size) for size in (0, 0xFFFFFFFF, 2_000_000_000, 1_000_000_000, 0x7FFFFFFF, 0x80000000, 100_000_000)),
        *(("AIFF", size) for size in (0, 0xFFFFFFFF, 0x7FFFFFFF, 2_000_000_000)),
        *(("AU", size) for size in (0xFFFFFFFF, 2_000_000_000)),
        *(("CAF", size) for size in (-1, 2_000_000_000)),
        *(("W64", size) for size in (0, 24, 2_000_000_000, (1 << 63) - 1, (1 << 64) - 1)),
    ],
)
def test_a_placeholder_for_the_size_is_no_size(form: str, size: int) -> None:
    warnings = list[str]()
    found = decode(placeholder(form, size), warnings=warnings)
    whole = decode(by_libsndfile(form, tone(RATE), RATE, "PCM_16"))
    assert len(found) == pytest.approx(len(whole), abs=16)
    assert np.array_equal(found[: len(whole) - 16], whole[: len(whole) - 16])
    assert warnings == []


@pytest.mark.parametrize("size", [0, (1 << 64) - 1, 2_000_000_000])
def test_an_rf64_need_not_know_its_size(size: int) -> None:
    content = bytearray(by_libsndfile("RF64", tone(RATE), RATE, "PCM_16"))
    content[content.find(b"data") + 4 :][:4] = b"\xff" * 4
    struct.pack_into("<Q", content, content.find(b"ds64") + 16, size)
    assert len(decode(bytes(content))) == pytest.approx(2 * RATE, abs=16)


@pytest.mark.parametrize(("kept", "refused"), [(0.5, True), (0.89, True), (0.91, False), (0.999, False)])
def test_a_file_is_refused_where_more_than_a_tenth_is_missing(kept: float, refused: bool) -> None:
    content = by_libsndfile("WAV", tone(RATE), RATE, "PCM_16")
    missing = missing_of(content[: int(len(content) * kept)])
    assert missing is not None
    assert (missing.share > 0.1) is refused


def test_an_avi_says_how_large_it_is() -> None:
    content = by_ffmpeg("avi", "libmp3lame", tone(RATE), RATE)
    assert missing_of(content) is None
    assert missing_of(content[:4] + bytes(4) + content[8:-100]) is None  # a recorder that was stopped
    assert code(content[: len(content) // 2]) == "truncated_media"
    warnings = list[str]()
    decode(content[:-200], warnings=warnings)
    assert warnings[0].startswith("s3://bucket/key ends too early: ")


def test_an_mp4_without_its_index_is_refused() -> None:
    content = by_ffmpeg("mp4", "aac", tone(RATE), RATE)
    assert code(content[: content.find(b"moov") - 4]) == "truncated_media"


def test_a_flac_that_lacks_frames_says_how_much() -> None:
    content, warnings = by_libsndfile("FLAC", tone(RATE, 20.0), RATE), list[str]()
    assert len(decode(content[: int(len(content) * 0.95)], warnings=warnings)) < 20 * RATE
    assert "of 20.000 s are there" in warnings[0]
    assert code(content[: len(content) // 2]) == "truncated_media"


# Kinds of files


@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [
        ("flv", "aac", 44_100),
        ("vob", "ac3", 48_000),
        ("mpeg", "mp2", 48_000),
        ("mpegts", "ac3", 48_000),
        ("ac3", "ac3", 48_000),
        ("eac3", "eac3", 48_000),
        ("wv", "wavpack", 48_000),
        ("tta", "tta", 48_000),
        ("amr", "libopencore_amrnb", 8_000),
        ("3gp", "libopencore_amrnb", 8_000),
        ("asf", "mp3", 44_100),
        ("avi", "mp3", 44_100),
        ("nut", "pcm_s16le", RATE),
        ("voc", "pcm_s16le", RATE),
        ("wav", "adpcm_ms", RATE),
        ("wav", "pcm_mulaw", 8_000),
        ("au", "pcm_alaw", 8_000),
    ],
)
def test_what_ffmpeg_opens_is_heard(form: str, codec: str, rate: int) -> None:
    warnings = list[str]()
    heard = decode(by_ffmpeg(form, codec, tone(rate), rate), warnings=warnings)
    assert len(heard) == pytest.approx(2 * RATE, rel=0.04)
    assert gain(heard, RATE) == pytest.approx(1.0, rel=0.2)
    assert warnings == []


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("RAW", "GSM610"), ("WAV", "GSM610"), ("AIFF", "GSM610"), ("NIST", None),
        ("MAT4", None), ("HTK", None), ("PAF", None), ("XI", "DPCM_16"),
    ],
)  # fmt: skip
def test_what_libsndfile_writes_is_heard(form: str, subtype: str | None) -> None:
    rate = 44_100 if form == "XI" else 8_000
    heard = decode(by_libsndfile(form, tone(rate), rate, subtype))
    assert len(heard) == pytest.approx(2 * RATE, rel=0.03)
    assert gain(heard, RATE) == pytest.approx(1.0, rel=0.1)


def test_warnings_are_bounded() -> None:
    warnings = list[str]()
    for index in range(20):
        note(warnings, f"{index} " + "long " * 100)
        note(warnings, f"{index} " + "long " * 100)
    assert len(warnings) == MOST_WARNINGS
    assert max(map(len, warnings)) <= MOST_CHARACTERS
    assert len(set(warnings)) == MOST_WARNINGS


def test_a_file_of_a_million_tags_takes_little_memory() -> None:
    content = (b"ID3\x04\0\0" + bytes(4)) * (1 << 20)
    tracemalloc.start()
    try:
        assert missing_of(content) is None
        assert len(parts(content)) == 1
        assert tracemalloc.get_traced_memory()[1] < 5 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tail", [b"", b"LIST\x04\0\0\0INFO"])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_plain_wav_gives_the_samples_that_ffmpeg_gives(rate: int, tail: bytes) -> None:
    content = by_libsndfile("WAV", tone(rate), rate, "PCM_16") + tail
    np.testing.assert_array_equal(decode(content), ffmpeg_read(content))


def test_joined_wavs_are_heard_to_the_end_of_the_last() -> None:
    whole = by_libsndfile("WAV", tone(RATE), RATE, "PCM_16") + by_libsndfile("WAV", tone(8000), 8000, "PCM_24")
    assert len(decode(whole * 2)) == pytest.approx(8 * RATE, abs=100)


def test_a_plain_wav_is_bounded_before_it_is_decoded() -> None:
    content = by_libsndfile("WAV", tone(RATE), RATE, "PCM_16")
    with pytest.raises(ItemError, match=r"above the bound of 1 s"):
        decode(content, max_seconds=1.0)
    with pytest.raises(OutgrownError) as caught:
        decode(content, most_bytes=1000)
    assert caught.value.size == 2 * RATE * SAMPLE
