"""The quick way for a WAV with one channel of 16 bits at the model's rate. Such a file needs neither FFmpeg nor a filter.

`recordings` asks here first, and gets a view of the samples, or None for any other file.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pipefleet_workers.inputs.containers import chunk_of

_HEAD = 12
_FORMAT = struct.Struct("<HHIIHH")
_PCM = 1


def plain_samples(content: bytes, rate: int) -> NDArray[np.int16] | None:
    """A view of the samples of such a file. None for any other file, and if its headers are followed by more than its samples."""
    if content[:4] != b"RIFF" or content[8:_HEAD] != b"WAVE":
        return None
    form = chunk_of(content[: 1 << 12], b"fmt ", at=_HEAD, layout="<4sI")
    if form is None or form[1] < _FORMAT.size or form[0] + _FORMAT.size > len(content):
        return None
    if _FORMAT.unpack_from(content, form[0]) != (_PCM, 1, rate, 2 * rate, 2, 16):
        return None
    data = chunk_of(content, b"data", at=form[0] + form[1] + form[1] % 2, layout="<4sI")
    if data is None or not data[1] or data[1] % 2 or sum(data) != len(content):
        return None
    return np.frombuffer(content, "<i2", offset=data[0])
