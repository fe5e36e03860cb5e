"""Reads the tensors of a CTranslate2 `model.bin`, without CTranslate2. `whisper` calls `read_model`.

In: the path of a file in the binary format of versions 2 to 6. Out: a `ModelFile` whose arrays are read-only
views of one buffer. The layout, little-endian throughout: version, spec name, revision, tensor count, then
per tensor its name, rank, dimensions, type number, byte count and bytes; from version 3 on a table of aliases
follows. A damaged or foreign file raises ModelFileError.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

VERSIONS = range(2, 7)
MAX_RANK = 8
_DTYPES: dict[int, npt.DTypeLike] = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


class ModelFileError(ValueError):
    """The file is not a whole CTranslate2 model; the message names the file and its fault."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The content of a `model.bin`.

    `version` is the version of the file format; `revision` belongs to `spec`, the architecture's name (`WhisperSpec`). `tensors`
    maps names such as `decoder/embeddings/weight` to read-only arrays; `aliases` maps further names to names in `tensors`.
    """

    version: int
    spec: str
    revision: int
    tensors: dict[str, Array]
    aliases: dict[str, str]


def read_model(path: Path) -> ModelFile:
    """Read the whole file at `path` into memory, once.

    Raises `ModelFileError` when the file is foreign, cut short, longer than its content or of an unknown
    version, and `OSError` when it cannot be read.
    """
    reader = _Reader(path.read_bytes(), path)
    version = reader.u32()
    if version not in VERSIONS:
        raise reader.error(f"version {version} is not one of {VERSIONS.start} to {VERSIONS.stop - 1}")
    spec, revision = reader.text(), reader.u32()
    tensors = dict(reader.tensor() for _ in range(reader.u32()))
    aliases = dict((reader.text(), reader.text()) for _ in range(reader.u32())) if version >= 3 else {}
    reader.finish()
    return ModelFile(version, spec, revision, tensors, aliases)


class _Reader:
    """A cursor over the file's bytes; every read first checks the remaining bytes."""

    def __init__(self, data: bytes, path: Path) -> None:
        self._data = memoryview(data)
        self._path = path
        self._at = 0

    def error(self, reason: str) -> ModelFileError:
        return ModelFileError(
            f"{self._path} is not a CTranslate2 model that can be read: {reason} (before byte {self._at}); "
            "give the model.bin of a converted model."
        )

    def take(self, size: int) -> memoryview:
        if size > len(self._data) - self._at:
            raise self.error(f"{size} bytes are announced and {len(self._data) - self._at} are left")
        self._at += size
        return self._data[self._at - size : self._at]

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int(struct.unpack("<H", self.take(2))[0])

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def text(self) -> str:
        raw = bytes(self.take(self.u16()))
        if not raw.endswith(b"\0") or not raw.isascii():
            raise self.error("a name is not zero-terminated ASCII")
        return raw[:-1].decode("ascii")

    def tensor(self) -> tuple[str, Array]:
        name, rank = self.text(), self.u8()
        if rank > MAX_RANK:
            raise self.error(f"tensor {name} has {rank} dimensions")
        shape = [self.u32() for _ in range(rank)]
        kind, size = self.u8(), self.u32()
        if kind not in _DTYPES:
            raise self.error(f"tensor {name} has the unknown type {kind}")
        dtype = np.dtype(_DTYPES[kind])
        if size != math.prod(shape) * dtype.itemsize:
            raise self.error(f"tensor {name} has {size} bytes for the shape {shape} of {dtype}")
        return name, np.frombuffer(self.take(size), dtype=dtype).reshape(shape)

    def finish(self) -> None:
        if self._at != len(self._data):
            raise self.error(f"{len(self._data) - self._at} bytes follow the model")
