"""Recordings of any container and layout, as FFmpeg's and libsndfile's encoders write them."""

from __future__ import annotations

import io
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from pipefleet_workers.inputs.sound.recordings import Samples, decode_audio
from pipefleet_workers.inputs.sound.tracks import sound_frame
from pipefleet_workers.items import Blob

RATE = 16_000
CASES = Path(__file__).parents[1] / "cases"


def tone(rate: int, seconds: float = 2.0, hz: float = 440.0) -> NDArray[np.float32]:
    """A tone of amplitude 0.3."""
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def by_ffmpeg(form: str, codec: str, samples: Samples, rate: int, layout: str = "mono", **options: str) -> bytes:
    """A file of samples of shape `[samples]` or `[samples, channels]`; `options` are those of the container."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=form, options=options) as container:
            stream: Any = container.add_stream(codec, rate=rate)
            stream.layout = layout
            fill(container, stream, samples, rate, layout)
        return file.read()


def fill(container: Any, stream: Any, samples: Samples, rate: int, layout: str) -> None:
    """Write samples into a track of a container; all its tracks are there by then."""
    frame = sound_frame(samples, rate, layout)
    frame.pts, frame.time_base = 0, Fraction(1, rate)
    size = stream.codec_context.frame_size or 1024
    converted = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate, frame_size=size)
    for piece in [*converted.resample(frame), *converted.resample(None), None]:
        container.mux(stream.encode(piece))


def by_libsndfile(form: str, samples: Samples, rate: int, subtype: str | None = None) -> bytes:
    """A file of samples of shape `[samples]` or `[samples, channels]`."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def case(name: str) -> bytes:
    """One of tests/cases."""
    return (CASES / name).read_bytes()


def decode(content: bytes, rate: int = RATE, max_seconds: float = 60.0, **options: Any) -> Samples:
    """The samples of a file."""
    return decode_audio(Blob("s3://bucket/key", content, None), rate=rate, max_seconds=max_seconds, **options)


def ffmpeg_read(content: bytes, rate: int = RATE) -> Samples:
    """As transformers' `ffmpeg_read`, which starts `ffmpeg -i pipe:0 -ac 1 -ar RATE -f f32le`; for files without damage."""
    with av.open(io.BytesIO(content)) as container:
        swresample = av.AudioResampler(format="flt", layout="mono", rate=rate)
        pieces = [one for frame in container.decode(audio=0) for one in swresample.resample(frame)]
        return np.concatenate([one.to_ndarray()[0] for one in [*pieces, *swresample.resample(None)]])


def gain(samples: Samples, rate: int, hz: float = 440.0) -> float:
    """How loud a tone of `tone` is in the middle of samples, as a factor."""
    middle = samples[len(samples) // 4 : -len(samples) // 4].astype(np.float64)
    turns = np.exp(-2j * np.pi * hz * np.arange(len(middle)) / rate)
    return float(2 * np.abs((middle * turns).mean()) / 0.3)
