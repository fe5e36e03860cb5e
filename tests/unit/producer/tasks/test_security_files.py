"""Attacks through the content of files: bombs that grow when they are decoded, and files that name other files or programs."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from pipefleet.contract.messages import MAX_MESSAGE_BYTES
from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet.tasks import TASKS, Media, TaskSpec
from pipefleet_workers.items import Blob, ItemError
from tests.checkpoints.media import frames, mp4_bytes
from tests.unit.attacks import BOUNDS, EVERY_TASK, FILMS, LISTED, SOUNDS, around, decode, positions, refusal, used


def png_bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black points: a thousandth of the memory that they take."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 20_000])
def test_a_picture_is_measured_before_it_is_decoded(side: int) -> None:
    bomb = Blob("s3://bucket/bomb.png", png_bomb(side), None)
    assert len(bomb.content) < 100_000
    attacked = 0
    tracemalloc.start()
    for spec in TASKS.values():
        for media, put in positions(spec, (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR)):
            for value in around(media, bomb):
                assert refusal(spec, put(value))[0] == "too_large"
                attacked += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert attacked
    assert peak < 16 << 20


def test_sound_is_measured_while_it_is_decoded() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(3600 * 4_000, np.float32), 4_000, format="FLAC")
    long = Blob("s3://bucket/silence.flac", buffer.getvalue(), None)
    raw = Blob("s3://bucket/samples", bytes(4 * 16_000 * 6), RAW_AUDIO)
    header = b"RIFF\x24\0\0\0WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 1, 2, 2, 16) + b"data" + struct.pack("<I", 4)
    slow = Blob("s3://bucket/slow.wav", header + b"\0\0\0\0", None)
    assert len(long.content) < 200_000
    for spec in TASKS.values():
        for media, put in positions(spec, SOUNDS):
            for value in (*around(media, long), *around(media, raw)):
                assert refusal(spec, put(value))[0] == "too_large"
            for value in around(media, slow):
                assert refusal(spec, put(value))[0] == "bad_media", "a rate of 1 Hz would make 16,000 samples of one"


@EVERY_TASK
def test_texts_and_json_have_bounds(spec: TaskSpec) -> None:
    long = Blob("s3://bucket/long", b"x" * (BOUNDS["max_text_bytes"] + 1), None)  # type: ignore[operator]
    deep = Blob("s3://bucket/deep", b"[" * 9_000, None)
    for media, put in positions(spec, (Media.TEXT, Media.TEXTS, Media.PROMPT, Media.TABLE, Media.LABELS, Media.DATA)):
        assert refusal(spec, put(long))[0] == "too_large", media
        if media in (Media.TABLE, Media.LABELS, Media.DATA):
            assert refusal(spec, put(deep))[0] == "bad_media", media


def test_a_message_has_a_bound() -> None:
    assert MAX_MESSAGE_BYTES <= 64 * 1024


SECRETS = {Media.AUDIO: "secret.wav", Media.VIDEO: "secret.mp4"}


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that no job may read."""
    monkeypatch.chdir(tmp_path)
    soundfile.write(tmp_path / "secret.wav", np.sin(np.arange(8000) / 20).astype("<f4"), 16_000)
    (tmp_path / "secret.mp4").write_bytes(mp4_bytes(frames(4)))
    return tmp_path


def playlists(name: str, folder: Path) -> dict[str, bytes]:
    """Small files that make FFmpeg open the file `name`."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    dash = '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{}</BaseURL></MPD>'
    return {
        "concat": f"ffconcat version 1.0\nfile {name}\n".encode(),
        "concat, absolute": f"ffconcat version 1.0\nfile {folder / name}\n".encode(),
        "hls": hls.format(name).encode(),
        "hls, absolute": hls.format(folder / name).encode(),
        "dash": dash.format(name).encode(),
        "sdp": b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n",
    }


def test_the_attack_works_where_nothing_holds_it_back(secrets: Path) -> None:
    for name in SECRETS.values():
        with av.open(io.BytesIO(playlists(name, secrets)["concat"])) as container:
            assert len(list(container.decode(container.streams[0]))) > 1


def test_playlists_open_no_other_file(secrets: Path) -> None:
    attacked = set()
    for spec in TASKS.values():
        for media, put in positions(spec, (*SOUNDS, *FILMS)):
            for name, content in playlists(SECRETS[LISTED.get(media, media)], secrets).items():
                attacked.add(LISTED.get(media, media))
                with pytest.raises(ItemError) as caught:
                    used(decode(spec, put(Blob(f"s3://bucket/{name}", content, "video/mp4"))))
                assert caught.value.failure.code == "bad_media", (spec.name, name)
    assert attacked == set(SECRETS)


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"P7 332\n",
        b"#define x_width 9\n#define x_height 9\nstatic char x_bits[] = {0};\n",
    ],
    ids=["postscript", "svg", "thumbnail", "bitmap"],
)
def test_formats_that_run_programs_or_name_files_are_no_pictures(content: bytes) -> None:
    for spec in TASKS.values():
        for media, put in positions(spec, (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR)):
            for value in around(media, Blob("s3://bucket/picture", content, "image/png")):
                assert refusal(spec, put(value))[0] == "bad_media"
