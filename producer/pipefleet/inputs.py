"""From what a user passes to what travels: local files, bytes, images and arrays become references to uploads.

Uploads lie under the store by content hash, so the same picture is sent once however often it is submitted.
"""

from __future__ import annotations

import hashlib
import io
import mimetypes
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipefleet.contract import encode_json
from pipefleet.errors import InputError, nearest
from pipefleet.objects import ObjectStore
from pipefleet.storage import StorageRef, is_ref, is_text_uri, is_uri, join_uri
from pipefleet.tasks import Media, TaskSpec

RAW_AUDIO = "audio/x-raw-float32"
"""Media type of bare samples: little-endian float32, mono, at the model's own rate (as transformers assumes)."""
TEXT_TYPE = "text/plain; charset=utf-8"
_TEXTS = (Media.TEXT, Media.PROMPT)
_PNG_MODES = {"1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"}


class InputPreparer:
    """Turns the inputs of one task into JSON with references. Thread-safe; uploads through `store`."""

    def __init__(self, spec: TaskSpec, store: ObjectStore, prefix: str, *, inline_bytes: int) -> None:
        self.spec = spec
        self._store = store
        self._prefix = prefix
        self._inline_bytes = inline_bytes

    def prepare(self, value: Any) -> Any:
        """The JSON form of one input. Raises InputError for a kind that the task does not take."""
        if is_ref(value):
            return StorageRef.from_json(value).to_json()
        if self.spec.fields and isinstance(value, Mapping):
            return self._prepare_fields(value)
        return self._prepare_one(value, self.spec.media)

    def spill(self, prepared: Any) -> Any:
        """`prepared` itself, or with texts too long for a message moved to the store."""
        if len(encode_json(prepared).encode()) <= self._inline_bytes:
            return prepared
        if isinstance(prepared, str):
            return self._upload(prepared.encode(), "txt", TEXT_TYPE)
        if isinstance(prepared, Mapping) and not is_ref(prepared):
            return {name: self.spill(item) for name, item in prepared.items()}
        if isinstance(prepared, list):
            return [self.spill(item) for item in prepared]
        return prepared

    def _prepare_fields(self, value: Mapping[str, Any]) -> dict[str, Any]:
        fields = self.spec.fields
        for name in value:
            if name not in fields:
                known = ", ".join(fields)
                raise InputError(
                    f"{self.spec.name} takes no field {str(name)[:40]!r}{nearest(str(name), fields)}; it takes {known}"
                )
        return {name: self._prepare_one(item, fields[name]) for name, item in value.items()}

    def _prepare_one(self, value: Any, media: Media) -> Any:
        if media is Media.PROMPT and isinstance(value, list | tuple):
            return self._chat(value)
        if is_uri(value) and (media not in _TEXTS or is_text_uri(value)):
            return StorageRef.of(value.rstrip("\r\n")).to_json()
        if isinstance(value, Path) or (isinstance(value, str) and media not in _TEXTS):
            return self._local_file(value)
        if media in _TEXTS:
            return self._text(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return self._upload(bytes(value), "bin", "application/octet-stream")
        if media is Media.IMAGE and hasattr(value, "save") and hasattr(value, "mode"):
            return self._upload(_png(value), "png", "image/png")
        if media is Media.AUDIO:
            return self._samples(value)
        raise InputError(
            f"{self.spec.name} takes s3:// URIs, local paths, bytes or {media.value} objects, not {_kind(value)}"
        )

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        raise InputError(f"{self.spec.name} takes texts, s3:// URIs of texts or Path objects, not {_kind(value)}")

    def _chat(self, messages: Sequence[Any]) -> list[dict[str, str]]:
        if not messages or not all(is_message(one) and len(one) == 2 for one in messages):
            raise InputError(
                f"{self.spec.name} takes chats as lists of messages {{role, content}} that hold nothing else"
            )
        return [{"role": self._text(one["role"]), "content": self._text(one["content"])} for one in messages]

    def _local_file(self, value: str | Path) -> dict[str, Any]:
        text = str(value)
        if text.startswith(("http://", "https://")):
            raise InputError(f"workers fetch nothing from the web: copy {text[:80]!r} to a bucket, or pass its bytes")
        path = Path(value)
        try:
            content = self._read(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or what has no form on this file system
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the input {text[:200]!r}: {reason}") from None
        return self._upload(content, path.suffix.lstrip(".").lower() or "bin", mimetypes.guess_type(path.name)[0])

    def _read(self, path: Path) -> bytes:
        return path.read_bytes()

    def _samples(self, value: Any) -> dict[str, Any]:
        """Mono samples: an array, or the dict `{"raw" or "array", "sampling_rate"}` that transformers takes."""
        rate: int | None = None
        if isinstance(value, Mapping):
            samples = value.get("raw", value.get("array"))
            rate = value.get("sampling_rate")
            if samples is None or not isinstance(rate, int) or rate <= 0:
                raise InputError("an audio dict needs `raw` (or `array`) with samples and a whole `sampling_rate`")
        else:
            samples = value
        if not hasattr(samples, "astype") or getattr(samples, "ndim", 0) != 1:
            raise InputError(f"audio samples must be a one-dimensional array, not {_kind(samples)}")
        content = samples.astype("<f4").tobytes()
        if rate is None:
            return self._upload(content, "f32", RAW_AUDIO)
        return self._upload(_wav_header(len(content), rate) + content, "wav", "audio/wav")

    def _upload(self, content: bytes, suffix: str, media_type: str | None) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        uri = join_uri(self._prefix, "uploads", digest[:2], f"{digest}.{suffix}")
        if self._store.head(uri) is None:
            self._store.put_new(uri, content, content_type=media_type or "application/octet-stream")
        return StorageRef(uri, size=len(content), type=media_type).to_json()

    def dry(self) -> InputPreparer:
        """One that refuses what this one refuses, but reads no local file and uploads nothing."""
        return _DryPreparer(self.spec, self._store, self._prefix, inline_bytes=self._inline_bytes)


class _DryPreparer(InputPreparer):
    def _read(self, path: Path) -> bytes:
        with path.open("rb"):
            return b""

    def _upload(self, content: bytes, suffix: str, media_type: str | None) -> dict[str, Any]:
        return StorageRef(join_uri(self._prefix, "uploads", f"any.{suffix}"), type=media_type).to_json()


def is_message(value: object) -> bool:
    """True for a message of a chat, as transformers tells it: a list that begins with one is a chat, not a batch."""
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _png(image: Any) -> bytes:
    """PNG bytes; of a mode that PNG lacks (CMYK, YCbCr, F …) as RGB, to which a pipeline would convert it anyway."""
    buffer = io.BytesIO()
    image = image if image.mode in _PNG_MODES else image.convert("RGB")
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _wav_header(data_bytes: int, rate: int) -> bytes:
    """RIFF header of mono IEEE-float samples (format 3), as the WAVE specification of 1991 and its 1994 update give it."""
    fmt = struct.pack("<HHIIHH", 3, 1, rate, rate * 4, 4, 32)
    return (
        b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
        + b"data" + struct.pack("<I", data_bytes)
    )  # fmt: skip


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
