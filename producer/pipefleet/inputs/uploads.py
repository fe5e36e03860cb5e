"""Uploads: local files, bytes, images and samples become objects below the fleet's store.

`prepare` calls `Uploader`; each method returns the JSON of a reference. The name of an object is the hash of its content, so the
same picture is sent once. InputError says that a file cannot be read; errors of S3 are those of `storage`.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
import re
from pathlib import Path
from typing import Any

from pipefleet.contract.references import StorageRef, join_uri
from pipefleet.errors import InputError
from pipefleet.inputs.local_files import fault, is_file
from pipefleet.inputs.pictures import LONGEST_PATH, inline, picture_file
from pipefleet.inputs.recordings import Recording, wav
from pipefleet.storage.store import ObjectStore

RAW_AUDIO = "audio/x-raw-float32"
"""Media type of bare samples: little-endian float32, mono, at the model's own rate (as transformers assumes)."""
TEXT_TYPE = "text/plain; charset=utf-8"
BYTES_TYPE = "application/octet-stream"
_SUFFIX = re.compile(r"[a-z0-9]{1,16}")


class Uploader:
    """Uploads inputs that do not fit into a message. Thread-safe. Every method returns the JSON of a StorageRef."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def content(self, content: bytes, suffix: str = "bin", media_type: str | None = BYTES_TYPE) -> dict[str, Any]:
        """Bytes, unchanged."""
        digest = hashlib.sha256(content).hexdigest()
        uri = join_uri(self._prefix, "uploads", digest[:2], f"{digest}.{suffix}")
        if self._store.head(uri) is None:
            self._store.put_new(uri, content, content_type=media_type or BYTES_TYPE)
        return StorageRef(uri, size=len(content), type=media_type).to_json()

    def file(self, value: str | os.PathLike[Any]) -> dict[str, Any]:
        """A local file. Raises InputError if it cannot be read, and for an address on the web."""
        text = os.fsdecode(value)
        if text.startswith(("http://", "https://")):
            raise InputError(f"workers fetch nothing from the web: copy {text[:80]!r} to a bucket, or pass its bytes")
        if (why := fault(text)) is not None:
            raise InputError(f"cannot read the input {text[:200]!r}: {why}")
        path = Path(text)
        try:
            content = self._read(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or characters that this file system lacks
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the input {text[:200]!r}: {reason}") from None
        return self.content(content, _suffix(path), mimetypes.guess_type(path.name)[0])

    def image(self, image: Any) -> dict[str, Any]:
        """A PIL image, upright and without loss: see `picture_file`."""
        return self.content(*picture_file(image))

    def picture(self, value: str) -> dict[str, Any]:
        """A text that names a local file, or holds a picture in base64 or as a `data:` URI. Raises as `file` does."""
        held = None if len(value) <= LONGEST_PATH and is_file(value) else inline(value)
        return self.file(value) if held is None else self.content(*held)

    def samples(self, recording: Recording) -> dict[str, Any]:
        """Mono samples: as WAV if they have a rate of their own, else bare."""
        if recording.rate is None:
            return self.content(recording.samples, "f32", RAW_AUDIO)
        return self.content(wav(recording), "wav", "audio/wav")

    def opened(self, file: Any) -> dict[str, Any]:
        """The rest of an open binary file. Afterwards the file stands at its old place, if it can seek.

        Raises InputError for a text file, for a file that cannot be read, and for a file with nothing left.
        """
        name = getattr(file, "name", None)
        path = Path(os.fsdecode(name) if isinstance(name, str | bytes) else "")
        content = _rest(file)
        if not isinstance(content, bytes | bytearray | memoryview):
            raise InputError("a file object must be open for bytes: open it with mode 'rb'")
        if not content:
            raise InputError("the file object has nothing left to read: seek(0) where it was just written or read")
        return self.content(bytes(content), _suffix(path), mimetypes.guess_type(path.name)[0] or BYTES_TYPE)

    def _read(self, path: Path) -> bytes:
        return _filled(path.read_bytes())


class DryUploader(Uploader):
    """Refuses the same inputs as an Uploader, but reads no local file and uploads nothing."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def content(self, content: bytes, suffix: str = "bin", media_type: str | None = BYTES_TYPE) -> dict[str, Any]:
        """A reference of the form that an upload would have."""
        return StorageRef(join_uri(self._prefix, "uploads", f"any.{suffix}"), type=media_type).to_json()

    def _read(self, path: Path) -> bytes:
        with path.open("rb") as file:
            _filled(file.read(1))
        return b""


def _filled(content: bytes) -> bytes:
    """`content`. Raises ValueError if it is empty: no worker takes an empty object."""
    if not content:
        raise ValueError("it is empty")
    return content


def _suffix(path: Path) -> str:
    """The suffix of an upload: the file's suffix if it is plain ASCII, because a URI cannot hold all bytes; else `bin`."""
    suffix = path.suffix.lstrip(".").lower()
    return suffix if _SUFFIX.fullmatch(suffix) else "bin"


def _rest(file: Any) -> Any:
    """The rest of a file. The file goes back to its place, so that a second try uploads the same bytes."""
    try:
        place = file.tell() if getattr(file, "seekable", lambda: False)() else None
        content = file.read()
        if place is not None:
            file.seek(place)
    except (OSError, ValueError) as error:  # ValueError: a file that is closed
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the file object: {reason}") from None
    return content
