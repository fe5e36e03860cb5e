"""Deterministic images, sounds, page scans and videos, and their encodings as the bytes that users upload."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Waveform = NDArray[np.float32]


def image(width: int, height: int, kind: int = 0, seed: int = 0) -> Image.Image:
    """An RGB picture with gradients, waves, noise and two shapes; `kind` changes waves and colour."""
    rng = np.random.default_rng(seed + 17 * width + height)
    y, x = np.mgrid[0:height, 0:width]
    waves = 127 + 120 * np.sin((x + (kind + 1) * y) / (7.0 + 3 * kind))
    planes = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), waves], -1)
    noisy = np.clip(planes + rng.normal(0, 12, planes.shape), 0, 255).astype(np.uint8)
    picture = Image.fromarray(noisy)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width * 0.2, height * 0.25, width * 0.55, height * 0.75), fill=(220, 30 + 40 * kind, 60))
    draw.rectangle((width * 0.6, height * 0.1, width * 0.9, height * 0.4), fill=(30, 200, 120))
    return picture


def audio(seconds: float, kind: str = "sine", rate: int = 16000, seed: int = 0) -> Waveform:
    """A mono waveform in -1..1 at `rate` Hz; `kind` is sine, chirp, noise or speech (voiced syllables)."""
    t = np.arange(int(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    if kind == "sine":
        wave = 0.4 * np.sin(2 * np.pi * 440 * t)
    elif kind == "chirp":
        wave = 0.4 * np.sin(2 * np.pi * (100 * t + 950 / max(seconds, 1e-3) * t**2))
    elif kind == "noise":
        wave = 0.1 * rng.standard_normal(len(t))
    elif kind == "speech":
        wave = _voice(t, rate, seed) + 0.01 * rng.standard_normal(len(t))
    else:
        raise ValueError(f"no sound of kind {kind!r}; use sine, chirp, noise or speech")
    return wave.astype(np.float32)


def _voice(t: NDArray[np.float64], rate: int, seed: int) -> NDArray[np.float64]:
    # Harmonics of a moving pitch under a syllable envelope at 4 Hz, with pauses.
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * t) + 10 * np.sin(2 * np.pi * 2.3 * t + seed)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    voiced = np.sum([np.sin(k * phase) / k for k in range(1, 9)], axis=0)
    envelope = np.clip(np.sin(2 * np.pi * 4 * t + seed), 0, 1) * (np.sin(2 * np.pi * 0.35 * t) > -0.6)
    return np.asarray(0.2 * voiced * envelope, dtype=np.float64)


def document(words: Sequence[str], width: int = 400, height: int = 300) -> tuple[Image.Image, list[Any]]:
    """A white page with `words` drawn on it, and `[word, [x0, y0, x1, y1]]` in thousandths of the page."""
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    x, y, boxes = 12, 12, []
    for word in words:
        length = draw.textlength(word)
        if x + length > width - 12:
            x, y = 12, y + 18
        draw.text((x, y), word, fill="black")
        corners = (x / width, y / height, (x + length) / width, (y + 12) / height)
        boxes.append([word, [min(1000, int(1000 * corner)) for corner in corners]])
        x += int(length) + 8
    return page, boxes


def frames(count: int, width: int = 64, height: int = 48, kind: int = 0) -> list[Image.Image]:
    """`count` pictures of a turning scene; even sizes suit every video encoder."""
    return [image(width, height, kind, seed=i).rotate(7 * i) for i in range(count)]


def wav_bytes(wave: Waveform, rate: int = 16000) -> bytes:
    """16-bit PCM WAV."""
    return sound_bytes(wave, "WAV", rate)


def sound_bytes(wave: Waveform, container: str, rate: int = 16000) -> bytes:
    """`wave` in a container that libsndfile writes: WAV, FLAC, OGG or MP3."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=container)
    return buffer.getvalue()


def image_bytes(picture: Image.Image, form: str = "PNG") -> bytes:
    """`picture` in a form that Pillow writes: PNG, JPEG, WEBP, GIF ..."""
    buffer = io.BytesIO()
    picture.save(buffer, format=form)
    return buffer.getvalue()


def jpeg_bytes(picture: Image.Image) -> bytes:
    """JPEG at Pillow's default quality; lossy, so compare results with the decoded picture."""
    return image_bytes(picture, "JPEG")


def gif_bytes(pictures: Sequence[Image.Image], rate: int = 12) -> bytes:
    """An animated GIF of `rate` frames per second."""
    buffer = io.BytesIO()
    rest = list(pictures[1:])
    pictures[0].save(buffer, format="GIF", save_all=True, append_images=rest, duration=int(1000 / rate), loop=0)
    return buffer.getvalue()


def mp4_bytes(pictures: Sequence[Image.Image], rate: int = 12) -> bytes:
    """An MP4 (MPEG-4 video) of `rate` frames per second; all pictures have the size of the first."""
    import av

    as_frame: Any = av.VideoFrame.from_image
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(as_frame(picture)))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode(value: Any, rate: int = 16000) -> tuple[str, bytes]:
    """File suffix and lossless bytes of a sample: picture -> PNG, waveform -> WAV, path -> its content.

    A WAV has 16 bits per sample, so a decoded waveform differs from the array by at most 2**-15.
    Raises TypeError for anything else.
    """
    if isinstance(value, Image.Image):
        return ".png", image_bytes(value)
    if isinstance(value, np.ndarray):
        return ".wav", wav_bytes(value, rate)
    if isinstance(value, Path):
        return value.suffix, value.read_bytes()
    raise TypeError(f"a {type(value).__name__} is no medium; pass a picture, a waveform or a path")
