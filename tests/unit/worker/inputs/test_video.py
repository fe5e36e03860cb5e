"""Video: the frames that transformers would take, from every container, and a refusal for what is cut, huge or a playlist."""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from transformers.pipelines.video_classification import read_video_pyav

from pipefleet_workers.inputs.video import Clip
from pipefleet_workers.items import Blob, ItemError
from tests.checkpoints.media import frames, gif_bytes, mp4_bytes, wav_bytes

COUNT, WIDTH, HEIGHT = 20, 64, 48
AV1 = Path(__file__).parents[3] / "cases" / "clip.obu"
"""A file, since the encoder would make this process real-time."""
_PIXELS = {"mjpeg": "yuvj420p", "apng": "rgb24"}


def muxed(container: str, codec: str, *, count: int = COUNT, width: int = WIDTH, **options: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:  # an index is moved to the front only in a file
        file = Path(folder) / "clip"
        with av.open(str(file), "w", format=container, options=options) as output:
            stream: Any = output.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = width, HEIGHT, _PIXELS.get(codec, "yuv420p")
            for picture in frames(count, width, HEIGHT):
                frame: Any = av.VideoFrame.from_image(picture).reformat(format=stream.pix_fmt)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        return file.read_bytes()


FILES: dict[str, Callable[[], bytes]] = {
    "mp4": cache(lambda: mp4_bytes(frames(COUNT, WIDTH, HEIGHT))),
    "mp4 for streaming": cache(lambda: muxed("mp4", "mpeg4", movflags="faststart")),
    "mp4 in fragments": cache(lambda: muxed("mp4", "mpeg4", movflags="frag_keyframe+empty_moov")),
    "mov": cache(lambda: muxed("mov", "mpeg4")),
    "webm": cache(lambda: muxed("webm", "libvpx")),
    "mkv": cache(lambda: muxed("matroska", "mpeg4")),
    "avi": cache(lambda: muxed("avi", "mpeg4")),
    "mpeg-ts": cache(lambda: muxed("mpegts", "mpeg2video")),
    "flv": cache(lambda: muxed("flv", "flv")),
    "asf": cache(lambda: muxed("asf", "mpeg4")),
    "mpeg-4 of a camera": cache(lambda: muxed("m4v", "mpeg4")),
    "ivf": cache(lambda: muxed("ivf", "libvpx")),
    "h.264 of a camera": cache(lambda: muxed("h264", "libx264")),
    "h.265 of a camera": cache(lambda: muxed("hevc", "libx265")),
    "motion jpeg of a camera": cache(lambda: muxed("mjpeg", "mjpeg")),
    "av1": AV1.read_bytes,
    "y4m": cache(lambda: muxed("yuv4mpegpipe", "rawvideo")),
    "apng": cache(lambda: muxed("apng", "apng")),
    "gif": cache(lambda: gif_bytes(frames(COUNT, WIDTH, HEIGHT))),
}


def clip(content: bytes, *, max_frames: int = 1000, max_pixels: int = 1 << 20) -> Clip:
    return Clip(Blob("s3://bucket/key", content, None), max_frames=max_frames, max_pixels=max_pixels)


def refusal(content: bytes, indices: list[int] | None = None, **bounds: int) -> str:
    with pytest.raises(ItemError) as caught:
        clip(content, **bounds).frames([0, 1] if indices is None else indices)
    assert caught.value.failure.stage == "decode"
    assert "s3://bucket/key" in caught.value.failure.message
    return caught.value.failure.code


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rate", [1, 3])
def test_frames_are_those_that_transformers_takes(name: str, rate: int) -> None:
    content = FILES[name]()
    indices = np.linspace(0, 6 * rate - 1, num=6, dtype=np.int64)
    with av.open(io.BytesIO(content)) as container:
        at_its_begin = SimpleNamespace(
            seek=lambda at: None, decode=container.decode
        )  # a bare stream cannot be sought in
        wanted = read_video_pyav(at_its_begin, indices)
    found = clip(content).frames(indices.tolist())
    assert np.array_equal(np.stack(found), wanted)
    assert found[0].shape == (HEIGHT, WIDTH, 3)
    assert not np.array_equal(found[0], found[-1])


@pytest.mark.parametrize("name", FILES)
def test_a_short_clip_gives_the_frames_it_has(name: str) -> None:
    there = clip(FILES[name]()).frames(range(COUNT + 30))
    assert COUNT - 1 <= len(there) <= COUNT  # MPEG-1 and 2 leave the last one out in some containers


@pytest.mark.parametrize("name", FILES)
def test_frames_are_counted(name: str) -> None:
    content = FILES[name]()
    assert clip(content).count() == len(clip(content).frames(range(COUNT)))


def test_a_clip_above_the_bound_on_frames_is_refused() -> None:
    content = FILES["mp4"]()
    assert refusal(content, [COUNT], max_frames=COUNT) == "too_large"
    assert len(clip(content, max_frames=COUNT).frames([COUNT - 1])) == 1
    for name in ("mp4", "webm"):
        with pytest.raises(ItemError) as caught:
            clip(FILES[name](), max_frames=COUNT - 1).count()
        assert caught.value.failure.code == "too_large"


@pytest.mark.parametrize("name", FILES)
def test_frames_above_the_bound_on_pixels_are_refused(name: str) -> None:
    assert refusal(FILES[name](), max_pixels=WIDTH * HEIGHT - 1) == "too_large"
    assert len(clip(FILES[name](), max_pixels=WIDTH * HEIGHT).frames([0])) == 1


def test_frames_that_are_small_one_by_one_have_a_bound_together() -> None:
    content = FILES["mp4"]()
    assert len(clip(content, max_pixels=WIDTH * HEIGHT).frames(range(8))) == 8
    assert refusal(content, list(range(9)), max_pixels=WIDTH * HEIGHT) == "too_large"


def test_a_stream_whose_frames_grow_is_refused() -> None:
    """Two MPEG-2 streams one behind the other: a decoder takes the second size as it comes."""
    content = b"".join(muxed("mpegts", "mpeg2video", count=6, width=width) for width in (WIDTH, 4 * WIDTH))
    sizes = {frame.shape for frame in clip(content).frames(range(12))}
    assert len(sizes) == 2, "the clip shows nothing"
    assert refusal(content, list(range(12)), max_pixels=WIDTH * HEIGHT) == "too_large"


@pytest.mark.parametrize("name", ["mp4", "mp4 for streaming", "mov", "mkv", "webm"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.85])
def test_a_file_of_which_much_is_missing_is_refused(name: str, kept: float) -> None:
    content = FILES[name]()
    assert refusal(content[: int(len(content) * kept)]) in ("truncated_media", "bad_media")


@pytest.mark.parametrize("name", ["mp4 for streaming", "mkv", "webm"])
def test_a_file_that_lacks_its_end_is_taken_with_a_warning(name: str) -> None:
    content, warnings = FILES[name](), list[str]()
    cut = Blob("s3://bucket/key", content[: int(len(content) * 0.97)], None)
    assert len(Clip(cut, 1000, 1 << 20, warnings=warnings).frames(range(COUNT))) >= COUNT // 2
    assert warnings[0].startswith("s3://bucket/key ends too early: ")
    with pytest.raises(ItemError) as caught:
        Clip(cut, 1000, 1 << 20, strict=True).frames(range(COUNT))
    assert caught.value.failure.code == "truncated_media"


def test_a_packet_that_cannot_be_decoded_is_left_out_of_a_film() -> None:
    content = damaged(FILES["avi"]())
    warnings = list[str]()
    found = Clip(Blob("s3://bucket/key", content, None), 1000, 1 << 20, warnings=warnings).frames(range(COUNT))
    assert COUNT // 2 <= len(found) < COUNT
    assert "packets could not be decoded" in warnings[0]
    with pytest.raises(ItemError) as caught:
        Clip(Blob("s3://bucket/key", content, None), 1000, 1 << 20, strict=True).frames(range(COUNT))
    assert caught.value.failure.code == "bad_media"


def damaged(content: bytes) -> bytes:
    """A film whose third packet of pictures holds zeros."""
    with av.open(io.BytesIO(content)) as container:
        packet = [bytes(one) for one in container.demux(container.streams.video[0])][2]
    assert content.count(packet) == 1
    return content.replace(packet, bytes(len(packet)))


def test_a_cover_is_not_the_film() -> None:
    found = clip(with_cover()).frames([0, 1])
    assert [frame.shape for frame in found] == [(HEIGHT, WIDTH, 3)] * 2


def with_cover() -> bytes:
    """An MP4 whose first track is a picture that is attached."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format="mp4") as container:
            cover, film = container.add_stream("mjpeg", rate=1), container.add_stream("mpeg4", rate=25)
            cover.disposition = av.stream.Disposition.attached_pic
            for stream, width in ((cover, 2 * WIDTH), (film, WIDTH)):
                stream.width, stream.height = width, HEIGHT
                stream.pix_fmt = "yuvj420p" if stream is cover else "yuv420p"
            for stream, count, width in ((cover, 1, 2 * WIDTH), (film, 5, WIDTH)):
                for picture in frames(count, width, HEIGHT):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
                container.mux(stream.encode(None))
        return file.read()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_cut_is_never_a_whole_clip(name: str) -> None:
    content = FILES[name]()
    try:
        found = clip(content[: len(content) // 2]).frames(range(COUNT))
    except ItemError as error:
        assert error.failure.code in ("truncated_media", "bad_media")  # noqa: PT017 - either way is right
    else:
        assert len(found) < COUNT - 1


@pytest.mark.parametrize("prefix", ["", "/", "file:"])
@pytest.mark.parametrize("kind", ["ffconcat", "m3u8", "dash", "sdp"])
def test_a_playlist_opens_no_file(kind: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.mp4").write_bytes(FILES["mp4"]())
    monkeypatch.chdir(tmp_path)
    place = {"": "secret.mp4", "/": f"{tmp_path}/secret.mp4", "file:": f"file:{tmp_path}/secret.mp4"}[prefix]
    texts = {
        "ffconcat": f"ffconcat version 1.0\nfile '{place}'\n",
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{place}\n#EXT-X-ENDLIST\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>{place}</BaseURL>'
        "</Period></MPD>",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns={place}\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    if kind == "ffconcat" and not prefix:
        with av.open(io.BytesIO(texts[kind].encode())) as attacked:
            assert next(attacked.decode(video=0)).width == WIDTH, "the attack does not work without the defence either"
    assert refusal(texts[kind].encode()) == "bad_media"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"hello, this is a text\n" * 50, bytes(4096), wav_bytes(np.zeros(800, np.float32))]
)
def test_what_is_no_video_is_refused(content: bytes) -> None:
    assert refusal(content) == "bad_media"


@pytest.mark.parametrize("name", FILES)
def test_damage_never_raises_anything_but_a_refusal(name: str) -> None:
    content, source = FILES[name](), random.Random(name)
    for _ in range(25):
        damaged = bytearray(content)
        for _ in range(source.choice((1, 3, 20, 200))):
            damaged[source.randrange(8, len(content))] = source.randrange(256)
        try:
            found = clip(bytes(damaged)).frames([0, 2, 5])
        except ItemError as error:
            assert error.failure.code in ("bad_media", "truncated_media", "too_large")  # noqa: PT017
        else:
            assert all(frame.ndim == 3 for frame in found)
