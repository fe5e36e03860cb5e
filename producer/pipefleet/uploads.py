"""From local files, bytes, images and arrays to objects under the store, by content hash: the same picture is sent once."""

from __future__ import annotations

import hashlib
import io
import mimetypes
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipefleet.errors import InputError
from pipefleet.objects import ObjectStore
from pipefleet.storage import StorageRef, join_uri

RAW_AUDIO = "audio/x-raw-float32"
"""Media type of bare samples: little-endian float32, mono, at the model's own rate (as transformers assumes)."""
TEXT_TYPE = "text/plain; charset=utf-8"
BYTES_TYPE = "application/octet-stream"
_PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


class Uploader:
    """Uploads what has no place in a message. Thread-safe. Every method returns the JSON of a StorageRef."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def content(self, content: bytes, suffix: str = "bin", media_type: str | None = BYTES_TYPE) -> dict[str, Any]:
        """Bytes as they are."""
        digest = hashlib.sha256(content).hexdigest()
        uri = join_uri(self._prefix, "uploads", digest[:2], f"{digest}.{suffix}")
        if self._store.head(uri) is None:
            self._store.put_new(uri, content, content_type=media_type or BYTES_TYPE)
        return StorageRef(uri, size=len(content), type=media_type).to_json()

    def file(self, value: str | Path) -> dict[str, Any]:
        """A local file. Raises InputError where it cannot be read, and for an address on the web."""
        text = str(value)
        if text.startswith(("http://", "https://")):
            raise InputError(f"workers fetch nothing from the web: copy {text[:80]!r} to a bucket, or pass its bytes")
        path = Path(value)
        try:
            content = self._read(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or what has no form on this file system
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the input {text[:200]!r}: {reason}") from None
        return self.content(content, path.suffix.lstrip(".").lower() or "bin", mimetypes.guess_type(path.name)[0])

    def image(self, image: Any) -> dict[str, Any]:
        """A PIL image, as PNG; of a mode that PNG lacks (CMYK, YCbCr, F …) as RGB, to which a pipeline converts it anyway."""
        buffer = io.BytesIO()
        image = image if image.mode in _PNG_MODES else image.convert("RGB")
        image.save(buffer, format="PNG", compress_level=1)
        return self.content(buffer.getvalue(), "png", "image/png")

    def samples(self, value: Any) -> dict[str, Any]:
        """Mono samples: an array or tensor, a decoder of torchcodec, or the dict `{"raw" or "array", "sampling_rate"}`."""
        if hasattr(value, "get_all_samples"):  # what `datasets` gives for a recording
            decoded = value.get_all_samples()
            value = {"raw": decoded.data.mean(0), "sampling_rate": decoded.sample_rate}
        rate: int | None = None
        samples = value
        if isinstance(value, Mapping):
            samples = value.get("raw", value.get("array"))
            rate = value.get("sampling_rate")
            if samples is None or not isinstance(rate, int) or rate <= 0:
                raise InputError("an audio dict needs `raw` (or `array`) with samples and a whole `sampling_rate`")
        content = _float32(samples)
        if rate is None:
            return self.content(content, "f32", RAW_AUDIO)
        return self.content(_wav_header(len(content), rate) + content, "wav", "audio/wav")

    def _read(self, path: Path) -> bytes:
        return _filled(path.read_bytes())


class DryUploader(Uploader):
    """One that refuses what an Uploader refuses, but reads no local file and uploads nothing."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def content(self, content: bytes, suffix: str = "bin", media_type: str | None = BYTES_TYPE) -> dict[str, Any]:
        """What the reference would look like."""
        return StorageRef(join_uri(self._prefix, "uploads", f"any.{suffix}"), type=media_type).to_json()

    def _read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            _filled(file.read(1))
        return b""


def _filled(content: bytes) -> bytes:
    """`content` itself. Raises ValueError where there is none, for no worker takes an empty object."""
    if not content:
        raise ValueError("it is empty")
    return content


def _float32(samples: Any) -> bytes:
    """One-dimensional samples as little-endian float32."""
    array = samples.detach().cpu().numpy() if hasattr(samples, "detach") else samples
    if not hasattr(array, "astype") or getattr(array, "ndim", 0) != 1:
        raise InputError(f"audio samples must be a one-dimensional array, not a value of type {type(samples).__name__}")
    if not array.size:
        raise InputError("the recording is empty: it has no samples")
    return bytes(array.astype("<f4").tobytes())


def _wav_header(data_bytes: int, rate: int) -> bytes:
    """RIFF header of mono IEEE-float samples (format 3), as the WAVE specification of 1991 and its 1994 update give it."""
    fmt = struct.pack("<HHIIHH", 3, 1, rate, rate * 4, 4, 32)
    return (
        b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
        + b"data" + struct.pack("<I", data_bytes)
    )  # fmt: skip
