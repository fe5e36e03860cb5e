"""Video: bytes to the frames a model wants. FFmpeg inside PyAV's wheel; playlist formats, which open other files, are refused."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from pipefleet_workers.items import Blob, ItemError

STAGE = "decode"
_FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,gif,asf,ogg"
Frame = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Clip:
    """An encoded video; frames are decoded when a model asks for them, within bounds on their number and size."""

    blob: Blob
    max_frames: int
    """Frames that are decoded at most, those that are skipped included."""
    max_pixels: int

    def frames(self, indices: Sequence[int]) -> list[Frame]:
        """The frames at `indices` (from 0, rising), each `[height, width, 3]` RGB. Fewer where the clip ends before.

        Raises ItemError: bad_media, truncated_media, too_large.
        """
        wanted = set(indices)
        found: list[Frame] = []
        last = max(wanted, default=-1)
        if last >= self.max_frames:
            raise ItemError("too_large", f"{self.blob.uri}: frame {last} is beyond {self.max_frames} frames", STAGE)
        for index, frame in enumerate(self._decoded()):
            if index in wanted:
                found.append(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
            if index >= last:
                break
        if not found:
            raise ItemError("bad_media", f"{self.blob.uri} holds no video frames", STAGE)
        return found

    def count(self) -> int:
        """Frames in the clip: as its container says, else counted by decoding, at most `max_frames`."""
        with self._open() as container:
            declared = container.streams.video[0].frames if container.streams.video else 0
        return int(declared) or sum(1 for _, _ in zip(range(self.max_frames), self._decoded(), strict=False))

    def _decoded(self) -> Iterator[av.VideoFrame]:
        with self._open() as container:
            if not container.streams.video:
                raise ItemError("bad_media", f"{self.blob.uri} holds no video", STAGE)
            stream = container.streams.video[0]
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > self.max_pixels:
                text = f"{self.blob.uri} has frames of {pixels} pixels, above the bound of {self.max_pixels}"
                raise ItemError("too_large", text, STAGE)
            try:
                yield from container.decode(stream)
            except av.FFmpegError as error:
                raise ItemError("truncated_media", f"{self.blob.uri} is damaged: {error.strerror}", STAGE) from None

    def _open(self) -> av.container.InputContainer:
        try:
            return av.open(io.BytesIO(self.blob.content), mode="r", options={"format_whitelist": _FORMATS})
        except (av.FFmpegError, ValueError):
            raise ItemError("bad_media", f"{self.blob.uri} is not a video ({_FORMATS})", STAGE) from None
