"""What inputs decode to is bounded: by the headers before, by settings meanwhile, and all of it by the worker's budget."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from transformers import WhisperFeatureExtractor

from pipefleet.contract.messages import JobItem
from pipefleet.inputs.uploads import RAW_AUDIO
from pipefleet.tasks import task_spec
from pipefleet_workers.adapters.audio.spectrograms import read_in_blocks
from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.engine.budget import Budget
from pipefleet_workers.inputs.declared import CHARACTER, PIXEL, SAMPLE
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.inputs.pictures.pictures import decode_image
from pipefleet_workers.inputs.pictures.pieces import MOST_CHUNKS, MOST_SCANS, MOST_STRIPS
from pipefleet_workers.inputs.video import Clip
from pipefleet_workers.items import Blob, Decoded, Fetched, ItemError, JobContext, Unit, Work
from pipefleet_workers.settings import WorkerSettings
from tests.checkpoints.media import frames, mp4_bytes
from tests.parity.harness import SECONDS, Call, load, recording, running, wait_until
from tests.unit.sound_files import by_ffmpeg

RATE = 16_000


def decoder(task: str, **settings: Any) -> Decoder:
    return Decoder(task_spec(task), WorkerSettings(**settings), sampling_rate=RATE)


def work(position: int = 0, inputs: Any = None, parameters: Any = None) -> Work:
    context = JobContext("job", None, {}, 3, None, Outcomes(range(1)))
    return Work(context, position, JobItem(str(position), inputs), parameters or {}, 1)


def blob(content: bytes, kind: str | None = None) -> Blob:
    return Blob("s3://bucket/key", content, kind)


def picture(form: str = "PNG", width: int = 60, height: int = 40, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, form, **options)
    return buffer.getvalue()


def wav(seconds: float, rate: int = RATE, channels: int = 1, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((int(seconds * rate), channels), np.float32), rate, format=form)
    return buffer.getvalue()


# Texts


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("feature-extraction", "x" * 101),
        ("feature-extraction", "\u6d77" * 40),
        ("text-classification", {"text": "x" * 60, "text_pair": "x" * 60}),
        ("token-classification", ["x" * 60, "x" * 60]),
        ("text-generation", [{"role": "user", "content": "x" * 101}]),
        ("image-text-to-text", [{"role": "user", "content": [{"type": "text", "text": "x" * 101}]}]),
        ("question-answering", {"question": "x", "context": "x" * 101}),
        ("table-question-answering", {"table": {"a": ["x" * 60, "x" * 60]}, "query": "x"}),
        ("table-question-answering", {"table": {"x" * 101: ["x"]}, "query": "x"}),
        ("zero-shot-object-detection", {"image": blob(picture()), "candidate_labels": ["x" * 60, "x" * 60]}),
        (
            "document-question-answering",
            {"image": blob(picture()), "question": "x", "word_boxes": [["x" * 99, [0] * 4]]},
        ),
        ("decision", {"state": "x" * 101, "questions": {}}),
    ],
)
def test_inline_texts_are_no_longer_than_those_of_objects(task: str, value: Any) -> None:
    with pytest.raises(ItemError) as caught:
        decoder(task, max_text_bytes=100).decode(Fetched(work(), value))
    assert caught.value.failure.code == "too_large"
    decoder(task, max_text_bytes=1000).decode(Fetched(work(), value))


def test_the_parameters_of_an_item_are_no_longer_than_its_texts() -> None:
    one = work()
    one.item = JobItem("0", "sea", {"candidate_labels": ["x" * 60, "x" * 60]})
    with pytest.raises(ItemError) as caught:
        decoder("zero-shot-classification", max_text_bytes=100).decode(Fetched(one, "sea"))
    assert caught.value.failure.code == "too_large"
    decoder("zero-shot-classification", max_text_bytes=1000).decode(Fetched(one, "sea"))


# What headers declare


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_picture_weighs_its_pixels(form: str) -> None:
    assert decoder("image-classification").weigh(blob(picture(form))) == 60 * 40 * PIXEL


def test_a_picture_with_a_thumbnail_weighs_its_own_pixels() -> None:
    exif = Image.Exif()
    exif[0x10E] = "x" * 60_000
    assert decoder("image-classification").weigh(blob(picture("JPEG", exif=exif, progressive=True))) == 2400 * PIXEL


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_recording_weighs_its_samples_at_the_rate_of_the_model(form: str) -> None:
    weight = decoder("automatic-speech-recognition").weigh(blob(wav(2, 44_100, 2, form)))
    assert weight == pytest.approx(2 * RATE * SAMPLE, rel=0.1)


def mp3(form: str = "mp3", codec: str = "libmp3lame", **options: str) -> bytes:
    """Three seconds; written to a pipe, it has no tag that says how long it is."""
    return by_ffmpeg(form, codec, noise(3.0), 44_100, **options)


def noise(seconds: float) -> Any:
    return np.random.default_rng(0).normal(0, 0.1, int(seconds * 44_100)).astype(np.float32)


def cover(size: int) -> bytes:
    """A tag with a picture, which holds marks of frames as any picture does."""
    noise = np.random.default_rng(1).bytes(size)
    size += 10
    high, upper, lower, low = (size >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + bytes([high, upper, lower, low]) + b"APIC" + struct.pack(">IH", size - 10, 0) + noise


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (mp3(), 3),
        (mp3(write_xing="0"), 3),
        (cover(2_000_000) + mp3(), 3),
        (cover(2_000_000) + mp3(write_xing="0"), 3),
        (mp3() * 4, 12),
        ((cover(30_000) + mp3()) * 4, 12),
        (mp3(write_xing="0") * 4, 12),
        (mp3("mp2", "mp2"), 3),
        (mp3("adts", "aac"), 3),
        (cover(50_000) + mp3("adts", "aac") * 2, 6),
    ],
)
def test_a_recording_of_frames_weighs_its_sound_and_not_its_pictures(content: bytes, seconds: int) -> None:
    weight = decoder("automatic-speech-recognition").weigh(blob(content))
    assert seconds * RATE * SAMPLE * 0.98 < weight < seconds * RATE * SAMPLE * 1.25


@pytest.mark.parametrize(
    "content",
    [
        mp3()[:700],
        mp3() * 2,
        b"\xff\xfb\x90\x64" + bytes(3000),
        b"\xff\xfb\x90\x64" + b"x" * 100,
        "sea".encode("utf-16"),
    ],
)
def test_no_library_writes_a_line_of_its_own_about_a_recording(
    content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    one = decoder("automatic-speech-recognition")
    assert one.weigh(blob(content)) > 0
    with contextlib.suppress(ItemError):
        one.decode(Fetched(work(), blob(content)))
    assert capfd.readouterr() == ("", "")


def test_a_wav_whose_size_is_not_known_weighs_the_samples_that_it_has() -> None:
    content = wav(2, 44_100)
    weight = decoder("automatic-speech-recognition").weigh(blob(content[:40] + bytes(4) + content[44:]))
    assert weight == pytest.approx(2 * RATE * SAMPLE, rel=0.1)


def test_other_inputs_weigh_what_they_are_made_of() -> None:
    assert decoder("automatic-speech-recognition").weigh(blob(b"\0" * 400, RAW_AUDIO)) == 100 * SAMPLE
    film = mp4_bytes(frames(10, 64, 48))
    assert decoder("video-classification").weigh(blob(film)) == 6 * 32 * 64 * 48
    assert decoder("feature-extraction").weigh("sea") == 3 * CHARACTER
    chat = [{"role": "user", "content": [{"type": "image", "image": blob(picture())}, {"type": "text", "text": "sea"}]}]
    weight = decoder("image-text-to-text").weigh(chat)
    assert weight == 2400 * PIXEL + (3 + len("userimagetext")) * CHARACTER
    assert decoder("image-to-text").weigh({"images": [blob(picture()), blob(picture())]}) == 4800 * PIXEL


@pytest.mark.parametrize("task", ["image-classification", "automatic-speech-recognition", "video-classification"])
def test_damage_weighs_something_and_raises_nothing(task: str) -> None:
    for content in (
        b"x",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0\x00\x00" * 5,
        b"\x89PNG\r\n\x1a\n",
        wav(1)[:60],
        picture()[:30],
    ):
        assert decoder(task).weigh(blob(content)) >= 0
    assert decoder(task, max_pixels=1, max_audio_seconds=0.1).weigh(blob(picture("PNG", 9999, 999))) < 1 << 16


# The budget


def test_who_waits_longest_for_room_to_decode_is_next() -> None:
    budget, first, large, small = Budget(10, 100), work(0), work(1), work(2)
    order: list[str] = []
    assert budget.decode([(first, 60)], lambda: False)

    def wait(name: str, one: Work, size: int) -> threading.Thread:
        def run() -> None:
            budget.decode([(one, size)], lambda: False)
            order.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [wait("large", large, 1000)]
    wait_until(lambda: len(budget._decoding) == 1, "the large one waits")
    threads.append(wait("small", small, 10))  # would fit beside the first, but not beside the large one
    wait_until(lambda: len(budget._decoding) == 2, "the small one waits behind it")
    assert order == []
    budget.prepared([(first, 5)])
    assert not budget.decode([(first, 60)], lambda: True)
    budget.leave(first)
    wait_until(lambda: order == ["large"], "the large one passes alone")
    budget.leave(large)
    for thread in threads:
        thread.join(SECONDS)
    budget.leave(small)
    assert order == ["large", "small"]
    assert budget.empty


class Watched:
    """How many bytes of decoded pictures there are at once."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.most = 0
        own = engine._stages.decoder.decode

        def decode(fetched: Fetched) -> Decoded:
            self.most = max(self.most, engine._budget._decoded)
            return own(fetched)  # type: ignore[no-any-return]

        engine._stages.decoder.decode = decode


@pytest.mark.parametrize("bulk", [True, False])
def test_decoded_pictures_are_within_the_budget(bulk: bool) -> None:
    """12 pictures of 2 MB, in slices of 12, where 5 MB may be there at once."""
    adapter = recording(RUNTIME["image-classification"].adapter, load("image-classification"))
    settings = WorkerSettings(in_flight_bytes=5 << 20, cpu_threads=3)
    with running(adapter, "image-classification", settings=settings) as one:
        watched = Watched(one.engine)
        calls = [Call(Image.new("RGB", (400, 300), (index, 0, 0)), {}) for index in range(12)]
        _, sink = one.submit(calls, bulk=bulk)
        sink.wait(SECONDS)
        assert [outcome.failure for outcome in sink.in_order()] == [None] * 12
        assert 400 * 300 * PIXEL <= watched.most <= 5 << 20
        wait_until(lambda: one.engine._budget.empty, "all room has come back")


def test_a_picture_beyond_the_whole_budget_passes_alone() -> None:
    adapter = recording(RUNTIME["image-classification"].adapter, load("image-classification"))
    with running(adapter, "image-classification", settings=WorkerSettings(in_flight_bytes=1000, cpu_threads=3)) as one:
        outcomes = one.run([Call(Image.new("RGB", (100, 100)), {}) for _ in range(8)])
        assert [outcome.failure for outcome in outcomes] == [None] * 8
        wait_until(lambda: one.engine._budget.empty, "all room has come back")


def test_a_piece_that_fails_whole_takes_no_other_with_it() -> None:
    kind = RUNTIME["image-classification"].adapter

    class Shaky(kind):  # type: ignore[misc, valid-type]
        def prepare(self, decoded: Sequence[Decoded]) -> list[list[Unit] | ItemError]:
            if any(one.value.size == (50, 50) for one in decoded):
                raise BaseException("the whole piece")
            return super().prepare(decoded)  # type: ignore[no-any-return]

    adapter = recording(Shaky, load("image-classification"))
    with running(adapter, "image-classification", settings=WorkerSettings(in_flight_bytes=1000)) as one:
        outcomes = one.run([Call(Image.new("RGB", (size, 50)), {}) for size in (40, 50, 60)])
        assert [outcome.failure and outcome.failure.code for outcome in outcomes] == [None, "internal_error", None]


# Pictures of too many pieces


def chunks(*named: tuple[bytes, bytes]) -> bytes:
    rows = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in named
    )
    return b"".join(rows)


def scans(count: int) -> bytes:
    content = picture("JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


def strips(count: int) -> bytes:
    tags = [(256, 4, 1, 1), (257, 4, 1, count), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 8)]
    rows = b"".join(struct.pack("<HHII", *tag) for tag in [*tags, (278, 4, 1, 1), (279, 4, count, 8)])
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags) + 2) + rows + b"\0" * 8


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (scans(MOST_SCANS), "scans"),
        (picture()[:33] + chunks((b"vpAg", b"")) * (MOST_CHUNKS + 1) + picture()[33:], "chunks"),
        (picture()[:33] + chunks((b"IDAT", b"")) * (MOST_CHUNKS + 1) + picture()[33:], "chunks"),
        (strips(MOST_STRIPS + 1), "strips"),
    ],
)
def test_a_picture_of_too_many_pieces_is_refused(content: bytes, found: str) -> None:
    with pytest.raises(ItemError) as caught:
        decode_image(blob(content), max_pixels=1 << 20)
    assert caught.value.failure.code == "too_large"
    assert found in caught.value.failure.message


@pytest.mark.parametrize(
    "content",
    [
        scans(20),
        picture("JPEG") + b"\xff\xda\x00\x02" * 1000,  # behind its end, such as the film of a moving photo
        picture()[:33] + chunks((b"tEXt", b"a\0b")) * 100 + picture()[33:],
        picture("TIFF", compression="tiff_lzw"),
    ],
)
def test_pictures_with_many_pieces_are_decoded(content: bytes) -> None:
    assert decode_image(blob(content), max_pixels=1 << 20).size == (60, 40)


# Films and recordings


def test_a_film_of_too_many_pixels_is_refused_before_and_while_it_is_decoded() -> None:
    content = mp4_bytes(frames(10, 64, 48))
    one = 64 * 48
    assert len(Clip(blob(content), 100, 2 * one, max_film_pixels=10 * one).frames(range(10))) == 10
    for indices in ([9], [0, 9]):
        with pytest.raises(ItemError) as caught:
            Clip(blob(content), 100, 2 * one, max_film_pixels=10 * one - 1).frames(indices)
        assert caught.value.failure.code == "too_large"
        assert "PIPEFLEET_WORKER_MAX_VIDEO_PIXELS" in caught.value.failure.message
    assert len(Clip(blob(content), 100, 2 * one, max_film_pixels=2 * one).frames([1])) == 1


@pytest.mark.parametrize(
    ("name", "parameters", "code"),
    [
        ("automatic-speech-recognition", {}, "too_long"),
        ("automatic-speech-recognition", {"chunk_length_s": 3}, "too_long"),
        ("automatic-speech-recognition", {"chunk_length_s": 1}, None),
        ("automatic-speech-recognition:whisper", {}, None),
        ("audio-classification", {}, "too_long"),
        ("audio-classification:ast", {}, None),
    ],
)
def test_no_model_hears_more_in_one_piece_than_it_may(name: str, parameters: dict[str, Any], code: str | None) -> None:
    adapter = RUNTIME[name.partition(":")[0]].adapter(load(name))
    adapter.max_whole_seconds = 2.0
    sound = np.random.default_rng(0).standard_normal(5 * RATE).astype(np.float32)
    (found,) = adapter.prepare([Decoded(work(0, None, parameters), sound)])
    assert (found.failure.code if isinstance(found, ItemError) else None) == code


@pytest.mark.parametrize(
    ("name", "minutes", "parameters", "code"),
    [
        ("automatic-speech-recognition", 1, {"chunk_length_s": 10, "stride_length_s": 4.99}, "bad_parameter"),
        ("automatic-speech-recognition", 1, {"chunk_length_s": 0.001}, "bad_parameter"),
        ("automatic-speech-recognition", 1, {"chunk_length_s": 10, "stride_length_s": [5, 5]}, "bad_parameter"),
        ("automatic-speech-recognition", 1, {"chunk_length_s": 10, "stride_length_s": [4, 2]}, None),
        ("automatic-speech-recognition:whisper", 20, {"chunk_length_s": 0.1}, "bad_parameter"),
        ("automatic-speech-recognition:whisper", 1, {"chunk_length_s": 10}, None),
    ],
)
def test_a_recording_is_not_cut_into_far_more_than_it_is(
    name: str, minutes: int, parameters: dict[str, Any], code: str | None
) -> None:
    """The first would be 187,000 pieces of 640 kB."""
    adapter = RUNTIME["automatic-speech-recognition"].adapter(load(name))
    sound = np.zeros(minutes * 60 * RATE, np.float32)
    (found,) = adapter.prepare([Decoded(work(0, None, parameters), sound)])
    assert (found.failure.code if isinstance(found, ItemError) else None) == code


def test_a_decoded_picture_holds_no_decoder() -> None:
    """That of WebP has two more copies of all pixels."""
    assert not hasattr(decode_image(blob(picture("WEBP")), max_pixels=1 << 20), "_decoder")


def test_a_recording_beyond_the_memory_of_the_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = RUNTIME["automatic-speech-recognition"].adapter(load("automatic-speech-recognition"))
    monkeypatch.setattr("pipefleet_workers.adapters.audio.waveforms.available_bytes", lambda: 1 << 20)
    sound = np.zeros(60 * RATE, np.float32)
    (found,) = adapter.prepare([Decoded(work(), sound)])
    assert isinstance(found, ItemError)
    assert found.failure.code == "too_long"
    assert "chunk_length_s" in found.failure.message


@pytest.mark.parametrize("samples", [121 * RATE, 125 * RATE + 77, 120 * RATE + 1])
def test_spectrograms_made_block_by_block_are_those_of_the_whole(samples: int) -> None:
    sound = np.random.default_rng(1).standard_normal(samples).astype(np.float32)
    keywords = {"sampling_rate": RATE, "truncation": False, "padding": "longest", "return_tensors": "np"}
    whole, blocks = WhisperFeatureExtractor(), WhisperFeatureExtractor()
    read_in_blocks(blocks)
    wanted = whole(sound, **keywords)["input_features"]
    found = blocks(sound, **keywords)["input_features"]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-6


# Memory, in a process of its own

_TOLD = "print('MB', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
_TEXT = f"""
import resource
from tests.unit.worker.inputs.test_declared_sizes import RUNTIME, Decoded, load, work
adapter = RUNTIME["feature-extraction"].adapter(load("feature-extraction"))
text = "the wide old sea of trees " * 230_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for parameters in ({{}}, {{"truncation": True}}):
    print(adapter.prepare([Decoded(work(0, None, parameters), text)]))
{_TOLD}
"""
_PICTURES = f"""
import resource
from PIL import Image
from tests.unit.worker.inputs.test_declared_sizes import RUNTIME, Call, WorkerSettings, blob, load, picture, recording, running
adapter = recording(RUNTIME["image-classification"].adapter, load("image-classification"))
with running(adapter, "image-classification", settings=WorkerSettings(in_flight_bytes=32 << 20, cpu_threads=4)) as one:
    one.run([Call(Image.new("RGB", (16, 16)), {{}})])
    calls = [Call(blob(picture("JPEG", 3000, 2000)), {{}})] * 32
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not any(outcome.failure for outcome in one.run(calls))
{_TOLD}
"""


@pytest.mark.parametrize(
    ("code", "most"),
    [
        pytest.param(_TEXT, 200, id="a text of 6 MB, at once 1 GB"),
        pytest.param(_PICTURES, 400, id="32 pictures of 6 megapixels, together 0.8 GB"),
    ],
)
def test_memory_is_bounded(code: str, most: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS * 4, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.rsplit("MB", 1)[1])
    assert grown < most, done.stdout[-500:]
