"""Video: from bytes to the frames that a model wants.

`Decoder` makes a `Clip`; the adapter asks it for frames. Damage becomes a warning, or with `strict` an ItemError. PyAV's FFmpeg
decodes; it opens no playlists, since these open other files.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipefleet_workers.inputs.containers import MOST_MISSING, missing_of
from pipefleet_workers.inputs.formats import VIDEO_FORMATS
from pipefleet_workers.inputs.losses import Losses, decoded, note, read_packets
from pipefleet_workers.items import Blob, ItemError

STAGE = "decode"
KEPT_PICTURES = 8
"""The kept frames of a model may have so many times the pixels of a single frame."""
_ALIGNMENT = 1 << 16
"""Pixels by which a decoder may round a small frame up."""
Frame = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Clip:
    """An encoded video; frames are decoded when a model asks for them, within bounds on their number and size. Thread-safe."""

    blob: Blob
    max_frames: int
    """Most frames that are decoded, skipped frames included."""
    max_pixels: int
    """Most pixels of one frame; all kept frames may have eight times as many."""
    max_film_pixels: int = 1 << 40
    """Most pixels of all decoded frames, skipped frames included: the time of decoding depends on them."""
    max_seconds: float = 900.0
    """Seconds that decoding may take."""
    strict: bool = False
    """Whether a film that is damaged, or lacks its end, is refused."""
    warnings: list[str] = field(default_factory=list)
    """Sentences on missing frames are added here."""

    def frames(self, indices: Sequence[int]) -> list[Frame]:
        """The frames at `indices` (from 0, rising), each `[height, width, 3]` RGB; fewer if the clip ends before.

        Raises ItemError: bad_media, truncated_media, too_large.
        """
        wanted, last = set(indices), max(indices, default=-1)
        if last >= self.max_frames:
            raise self._too_large(f"frame {last} is wanted", f"{self.max_frames} frames")
        found: list[Frame] = []
        pixels = 0
        losses = Losses()
        for index, frame in enumerate(self._decoded(last + 1, losses)):
            if index in wanted:
                pixels += frame.width * frame.height
                if pixels > KEPT_PICTURES * self.max_pixels:
                    raise self._too_large("the frames wanted are large", f"{KEPT_PICTURES * self.max_pixels} pixels")
                found.append(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8))
            if index >= last:
                break
        if not found and wanted:
            raise ItemError("bad_media", f"{self.blob.uri} holds no frames that can be decoded", STAGE)
        self._tell(losses)
        return found

    def _tell(self, losses: Losses) -> None:
        """Warn of missing parts of the film; with `strict`, raise ItemError (bad_media)."""
        missing = missing_of(self.blob.content)
        if missing:
            note(self.warnings, f"{self.blob.uri} ends too early: {missing.text}")
        if losses.text:
            if self.strict:
                raise ItemError("bad_media", f"{self.blob.uri} is damaged: {losses.text}", STAGE)
            note(self.warnings, f"{self.blob.uri} is damaged: {losses.text}; the result is of the rest")

    def count(self) -> int:
        """Frames in the clip, by its container or counted by decoding. Raises the ItemErrors of `frames`."""
        with self._open() as container:
            found = int(_film(container).frames)
        if found <= 0:
            found = sum(1 for _, _ in zip(range(self.max_frames + 1), self._decoded(1, Losses()), strict=False))
        if found > self.max_frames:
            raise self._too_large("it has more frames", str(self.max_frames))
        return found

    def rate(self) -> float | None:
        """Frames in a second, on average; None if the container does not declare it. Raises the ItemErrors of `frames`."""
        with self._open() as container:
            found = _film(container).average_rate
        return float(found) if found else None

    def _decoded(self, wanted: int, losses: Losses) -> Iterator[av.VideoFrame]:
        """The frames. Raises ItemError before the first frame if `wanted` frames have too many pixels."""
        with self._open() as container:
            stream = _film(container)
            width, height = stream.codec_context.width, stream.codec_context.height
            self._check(width, height)
            self._check_film(width * height * min(wanted, stream.frames or wanted))
            # A stream may change the size of its header; the decoder checks this bound before it allocates.
            stream.codec_context.options = {"max_pixels": str(2 * self.max_pixels + _ALIGNMENT)}
            yield from self._checked(read_packets(container, stream, losses), stream.codec_context, losses)

    def _checked(
        self, packets: Iterable[av.Packet[Any]], context: av.VideoCodecContext, losses: Losses
    ) -> Iterator[av.VideoFrame]:
        """The frames of packets. Packets without a frame count too: a codec may decode pictures and hide them."""
        pixels = hidden = 0
        end = time.monotonic() + self.max_seconds
        for packet in packets:
            hidden += context.width * context.height // 2  # half, since two packets may be the halves of one frame
            self._check_film(max(pixels, hidden))
            for frame in decoded(packet, losses):
                self._check(frame.width, frame.height)
                pixels += frame.width * frame.height
                self._check_film(pixels)
                yield frame
            if time.monotonic() > end:
                raise self._too_large("its frames take long to decode", f"{self.max_seconds:.0f} s")

    def _open(self) -> av.container.InputContainer:
        missing = missing_of(self.blob.content)
        if missing and (self.strict or missing.share > MOST_MISSING):
            raise ItemError("truncated_media", f"{self.blob.uri} ends too early: {missing.text}", STAGE)
        try:
            container = av.open(io.BytesIO(self.blob.content), mode="r", options={"format_whitelist": VIDEO_FORMATS})
        except (av.FFmpegError, ValueError):
            raise ItemError("bad_media", f"{self.blob.uri} is not a video ({VIDEO_FORMATS})", STAGE) from None
        if not container.streams.video or _film(container).codec_context is None:
            container.close()
            raise ItemError("bad_media", f"{self.blob.uri} holds no video that can be decoded", STAGE)
        return container

    def _check(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise self._too_large(f"its frames have {width} x {height} pixels", f"{self.max_pixels} pixels")

    def _check_film(self, pixels: int) -> None:
        if pixels > self.max_film_pixels:
            found = f"{pixels} pixels would be decoded of its frames"
            raise self._too_large(found, f"{self.max_film_pixels} (PIPEFLEET_WORKER_MAX_VIDEO_PIXELS)")

    def _too_large(self, found: str, bound: str) -> ItemError:
        return ItemError("too_large", f"{self.blob.uri}: {found}, above the bound of {bound}", STAGE)


def _film(container: Any) -> Any:
    """The first track of pictures, as in transformers; a cover picture does not count."""
    tracks = container.streams.video
    films = [one for one in tracks if not one.disposition & av.stream.Disposition.attached_pic]
    return (films or tracks)[0]
