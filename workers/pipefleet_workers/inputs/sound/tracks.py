"""Turns decoded sound into one channel at the model's rate, piece by piece, as `ffmpeg -ac 1 -ar RATE -f f32le` does.

The readers of `ffmpeg` and `recordings` add frames to a `Track`; `Track.end` gives the samples.

If the rate, the channels or the sample format change on the way, a new piece begins, which is converted from its own format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipefleet_workers.inputs.declared import SAMPLE
from pipefleet_workers.items import ItemError, OutgrownError

STAGE = "decode"
_RATES = (1_000, 1_000_000)
"""The lowest and the highest accepted sampling rate, in Hz. With other rates a small file becomes gigabytes."""
_BLOCK = 1 << 14
"""Samples that are passed on at once."""
_SHORT = np.float32(2.0**-15)

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one recording."""

    uri: str
    rate: int
    """The model's rate in Hz."""
    max_seconds: float
    most_bytes: int | None = None
    """Bytes of the budget that it may take; None for no bound."""

    def check(self, seconds: float) -> None:
        """Raise ItemError (too_large) for more seconds than the bound."""
        if seconds > self.max_seconds:
            text = f"{self.uri} lasts {seconds:.0f} s, above the bound of {self.max_seconds:.0f} s"
            raise ItemError("too_large", text, STAGE)


class Track:
    """Takes frames as they are decoded: a long recording is never held in full at its own rate. For one thread."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._kind: tuple[Any, ...] | None = None
        self._mixer: _Mixer | None = None
        self._pieces: list[Samples] = []
        self._outgrown = False
        self.seconds = 0.0
        """The length of the frames so far."""

    @property
    def rate(self) -> int:
        """The model's rate in Hz."""
        return self._bounds.rate

    @property
    def most_seconds(self) -> float:
        """The longest recording."""
        return self._bounds.max_seconds

    def add(self, frame: av.AudioFrame, order: str | None = None) -> None:
        """Take one frame. `order` names the channels of a frame that only gives their number.

        Raises ItemError: too_large, or bad_media for a rate outside `_RATES`.
        """
        kind = (frame.sample_rate, frame.layout.name, frame.format.name)
        order = order if kind[1] == f"{frame.layout.nb_channels} channels" else None
        if kind != self._kind:
            self._finish()
            if not _RATES[0] <= frame.sample_rate <= _RATES[1]:
                text = f"{self._bounds.uri} has a sampling rate of {frame.sample_rate} Hz"
                raise ItemError("bad_media", text, STAGE)
            self._kind, self._mixer = kind, _Mixer(self._bounds.rate, order)
        self._count(frame.samples / frame.sample_rate)
        if not self._outgrown and self._mixer is not None:
            self._pieces += self._mixer.mix(frame)

    def add_plain(self, samples: NDArray[np.int16]) -> None:
        """Take samples of one channel at the model's rate; they stay unchanged. Raises ItemError: too_large."""
        self._count(len(samples) / self._bounds.rate)
        if not self._outgrown:
            self._pieces.append(samples * _SHORT)

    def _count(self, seconds: float) -> None:
        self.seconds += seconds
        self._bounds.check(self.seconds)
        if not self._outgrown and self._bounds.most_bytes is not None and self._bytes() > self._bounds.most_bytes:
            self._outgrown = True
            self._pieces.clear()

    def end(self) -> Samples:
        """All samples at the model's rate. Raises OutgrownError."""
        if self._outgrown:
            text = f"{self._bounds.uri} lasts {self.seconds:.0f} s, longer than it declares"
            raise OutgrownError(text, STAGE, self._bytes())
        self._finish()
        return np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.float32)

    def _finish(self) -> None:
        if self._mixer is not None and not self._outgrown:
            self._pieces += self._mixer.mix(None)
        self._mixer = None

    def _bytes(self) -> int:
        return math.ceil(self.seconds * self._bounds.rate) * SAMPLE


class _Mixer:
    """FFmpeg's own filter (swresample), with its matrix for the layout. A layout without a matrix is mixed to its mean."""

    def __init__(self, rate: int, order: str | None = None) -> None:
        self._swresample: Any = (
            _Ordered(rate, order)
            if order
            else av.AudioResampler(format="flt", layout="mono", rate=rate, frame_size=_BLOCK)
        )
        self._packed = av.AudioResampler(format="flt")
        self._to_mean = False

    def mix(self, frame: av.AudioFrame | None) -> list[Samples]:
        """The samples that are ready after one more frame; all remaining samples after None."""
        if frame is not None and not self._to_mean:
            try:
                return self._mixed(frame)
            except (av.FFmpegError, ValueError):
                if frame.layout.nb_channels <= 2:
                    raise
                self._to_mean = True
                self._swresample = av.AudioResampler(
                    format="flt", layout="mono", rate=self._swresample.rate, frame_size=_BLOCK
                )
        if frame is None:
            return self._mixed(None)
        return [piece for mean in self._mean(frame) for piece in self._mixed(mean)]

    def _mixed(self, frame: av.AudioFrame | None) -> list[Samples]:
        return [one.to_ndarray()[0] for one in self._swresample.resample(frame) if one is not None]

    def _mean(self, frame: av.AudioFrame) -> list[av.AudioFrame]:
        found = []
        for one in self._packed.resample(frame):
            samples = one.to_ndarray().reshape(-1, frame.layout.nb_channels)
            found.append(sound_frame(samples.mean(axis=1, dtype=np.float32), frame.sample_rate))
        return found


class _Ordered:
    """Works as av.AudioResampler, for frames that only give their number of channels; `order` names the channels."""

    def __init__(self, rate: int, order: str) -> None:
        self.rate = rate
        self._order = order
        self._graph: av.filter.Graph | None = None

    def resample(self, frame: av.AudioFrame | None) -> list[Any]:
        """The samples that are ready after one more frame; all remaining samples after None."""
        if self._graph is None:
            if frame is None:
                return []
            self._graph = self._made_for(frame)
        self._graph.push(frame)
        found: list[Any] = []
        while True:
            try:
                found.append(self._graph.pull())
            except (av.error.EOFError, av.error.BlockingIOError):
                return found

    def _made_for(self, frame: av.AudioFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        given = {"sample_rate": str(frame.sample_rate), "sample_fmt": frame.format.name, "channel_layout": self._order}
        wanted = {"sample_rates": str(self.rate), "sample_fmts": "flt", "channel_layouts": "mono"}
        graph.link_nodes(graph.add("abuffer", **given), graph.add("aformat", **wanted), graph.add("abuffersink"))
        graph.configure()
        graph.set_audio_frame_size(_BLOCK)
        return graph


def sound_frame(samples: Samples, rate: int, layout: str = "mono") -> av.AudioFrame:
    """A frame of float32 samples of shape `[samples, channels]` or `[samples]`, at `rate` Hz.

    Packed: if a frame had a plane for each of eight or more channels, PyAV would read one plane too many.
    """
    packed = np.ascontiguousarray(samples, np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=layout)
    frame.sample_rate = rate
    return frame
