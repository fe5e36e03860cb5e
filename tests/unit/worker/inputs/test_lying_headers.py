"""Recordings that last longer than their headers declare, and the budget of decoded inputs whatever becomes of them."""

from __future__ import annotations

import io
import struct
import time
import types
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from pipefleet_workers.adapters.table import RUNTIME
from pipefleet_workers.inputs.declared import SAMPLE
from pipefleet_workers.inputs.losses import Losses
from pipefleet_workers.inputs.video import Clip
from pipefleet_workers.items import Blob, Decoded, Fetched, ItemError, OutgrownError
from pipefleet_workers.settings import WorkerSettings
from tests.checkpoints.media import frames, mp4_bytes
from tests.parity.harness import SECONDS, Call, load, recording, running, wait_until
from tests.unit.worker.inputs.test_declared_sizes import RATE, blob, decoder, picture, wav, work

TASK = "automatic-speech-recognition"
_DURATION = b"\x44\x89\x88"


def liar(seconds: int, declared: float) -> bytes:
    """A Matroska file of noise that lasts `seconds` and declares another duration, in seconds."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=RATE)
        stream.layout = "mono"
        for second in range(seconds):
            samples = np.random.default_rng(second).integers(-9000, 9000, (1, RATE), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, second * RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = buffer.getvalue()
    at = content.index(_DURATION) + len(_DURATION)
    return content[:at] + struct.pack(">d", declared * 1000) + content[at + 8 :]


def test_a_recording_longer_than_it_declares_is_only_counted() -> None:
    long, one = liar(60, 0.5), decoder(TASK)
    item = work()
    item.room.decoded = one.weigh(blob(long))
    assert item.room.decoded < 1 << 20
    with pytest.raises(OutgrownError) as caught:
        one.decode(Fetched(item, blob(long)))
    assert caught.value.size >= 60 * RATE * SAMPLE
    item.room.decoded = caught.value.size
    assert len(one.decode(Fetched(item, blob(long))).value) == 60 * RATE


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_recording_as_long_as_it_declares_is_decoded_once(form: str) -> None:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8000, 1, format=form) as file:
        for _ in range(600):  # libsndfile cannot write much of Ogg at once
            file.write(np.zeros(8000, np.float32))
    one, item, content = decoder(TASK), work(), buffer.getvalue()
    item.room.decoded = one.weigh(blob(content))
    assert len(one.decode(Fetched(item, blob(content))).value) == pytest.approx(600 * RATE, rel=0.01)


class Rooms:
    """What each recording that is decoded was let in with, in bytes, and the bytes that it needed."""

    def __init__(self, engine: Any) -> None:
        self.seen: list[tuple[int, int]] = []
        own = engine._stages.decoder.decode

        def decode(fetched: Fetched) -> Decoded:
            found: Decoded = own(fetched)
            self.seen.append((fetched.work.room.decoded, len(found.value) * SAMPLE))
            return found

        engine._stages.decoder.decode = decode


def test_a_recording_that_lies_waits_for_room_for_all_of_it() -> None:
    adapter = recording(RUNTIME[TASK].adapter, load(TASK))
    settings = WorkerSettings(in_flight_bytes=16 << 20, cpu_threads=3)
    long, short = blob(liar(60, 0.1)), blob(wav(2))
    with running(adapter, TASK, settings=settings) as one:
        rooms = Rooms(one.engine)
        outcomes = one.run([Call(each, {"chunk_length_s": 5}) for each in (long, short, long, short, long)])
        assert [outcome.failure for outcome in outcomes] == [None] * 5
        wait_until(lambda: one.engine._budget.empty, "all room has come back")
    assert len(rooms.seen) == 5
    assert all(needed <= room for room, needed in rooms.seen)


@pytest.mark.parametrize("end", ["cancelled", "expired", "given back"])
def test_all_room_comes_back_whatever_becomes_of_recordings(end: str) -> None:
    adapter = recording(RUNTIME[TASK].adapter, load(TASK))
    settings = WorkerSettings(in_flight_bytes=2 << 20, cpu_threads=3)
    kinds = [blob(liar(20, 0.1)), blob(wav(2)), Blob("s3://bucket/key", b"RIFFnone", None)]
    calls = [Call(kinds[index % 3], {"chunk_length_s": 5}) for index in range(60)]
    with running(adapter, TASK, settings=settings) as one:
        deadline = time.monotonic() + 0.3 if end == "expired" else None
        job, sink = one.submit(calls, deadline=deadline)
        if end != "expired":
            wait_until(lambda: one.engine._budget._decoded > 0, "something is decoded")
        if end == "cancelled":
            job.cancelled = True
        elif end == "given back":
            job.give_back(RuntimeError("nobody needs it"))
        else:
            sink.wait(SECONDS)
        wait_until(lambda: one.engine._budget.empty, "all room has come back")
        (after,) = one.run([Call(blob(wav(1)), {})])
        assert after.failure is None


# What a model reads of an input


def test_ast_hears_the_same_of_a_long_recording_as_of_all_of_it() -> None:
    adapter = RUNTIME["audio-classification"].adapter(load("audio-classification:ast"))
    sound = np.random.default_rng(3).standard_normal(20 * RATE).astype(np.float32)
    ((unit,),) = adapter.prepare([Decoded(work(), sound)])
    wanted = adapter.pipe.feature_extractor(sound, sampling_rate=RATE, return_tensors="np")["input_values"]
    assert np.array_equal(unit.features["input_values"].numpy(), wanted)
    assert len(adapter._heard(sound)) < 2 * RATE


def test_a_recording_that_would_be_read_whole_for_a_part_of_it_is_refused() -> None:
    adapter = RUNTIME["zero-shot-audio-classification"].adapter(load("zero-shot-audio-classification"))
    adapter.pipe.feature_extractor.truncation = "fusion"
    adapter.max_whole_seconds = 12.0
    sound = np.zeros(13 * adapter.sampling_rate, np.float32)
    (found,) = adapter.prepare([Decoded(work(0, None, {"candidate_labels": ["rain"]}), sound)])
    assert isinstance(found, ItemError)
    assert found.failure.code == "too_long"


def test_a_picture_that_is_not_resized_has_few_enough_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = RUNTIME["image-to-image"].adapter(load("image-to-image"))
    large, small = Image.new("RGB", (5000, 4000)), Image.new("RGB", (300, 300))
    refused, taken = adapter.prepare([Decoded(work(), large), Decoded(work(), small)])
    assert isinstance(refused, ItemError)
    assert refused.failure.code == "too_large"
    assert "MAX_WHOLE_PIXELS" in refused.failure.message
    assert not isinstance(taken, ItemError)
    monkeypatch.setattr("pipefleet_workers.adapters.vision.whole_pictures.available_bytes", lambda: 1 << 20)
    (found,) = adapter.prepare([Decoded(work(), small)])
    assert isinstance(found, ItemError)
    assert found.failure.code == "too_large"
    resized = RUNTIME["image-classification"].adapter(load("image-classification"))
    (units,) = resized.prepare([Decoded(work(), large)])
    assert not isinstance(units, ItemError)


def test_a_film_is_decoded_for_some_time_only() -> None:
    clip = Clip(blob(mp4_bytes(frames(10, 64, 48))), 100, 1 << 20, max_seconds=-1)
    with pytest.raises(ItemError) as caught:
        clip.frames(range(10))
    assert caught.value.failure.code == "too_large"


def test_pictures_that_a_film_hides_count_too() -> None:
    """Packets whose frames are never shown; two of them may be the halves of one frame."""
    clip = Clip(blob(b""), 100, 1 << 20, max_film_pixels=4 * 64 * 48)
    packet, context = types.SimpleNamespace(decode=list), types.SimpleNamespace(width=64, height=48)
    assert list(clip._checked([packet] * 8, context, Losses())) == []
    with pytest.raises(ItemError) as caught:
        list(clip._checked([packet] * 9, context, Losses()))
    assert caught.value.failure.code == "too_large"


def test_the_pictures_of_one_input_are_bounded_together() -> None:
    part = {"type": "image", "image": blob(picture("PNG", 100, 100))}
    one = [{"role": "user", "content": [part] * 9}]
    with pytest.raises(ItemError) as caught:
        decoder("image-text-to-text", max_pixels=10_000).decode(Fetched(work(), one))
    assert caught.value.failure.code == "too_large"
    decoder("image-text-to-text", max_pixels=12_000).decode(Fetched(work(), one))
