"""The parts of a file that a decoder could not read, and the sentences about them that go with its result.

Decoders of sound and video count losses here while they read. Damage raises nothing here: callers warn or refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av

MOST_WARNINGS = 10
MOST_CHARACTERS = 300


@dataclass(slots=True)
class Losses:
    """The losses of one file, counted while it is decoded."""

    lost: int = 0
    """Packets that could not be decoded."""
    packets: int = 0
    """All packets."""
    pages: int = 0
    """Pages of an Ogg that are missing or damaged: their packets never came."""
    stopped: str = ""
    """Why reading ended before the end of the data."""

    @property
    def text(self) -> str:
        """One clause that names the losses; empty if there are none."""
        told = []
        if self.lost:
            told.append(f"{self.lost} of {self.packets} packets could not be decoded")
        if self.pages:
            told.append(
                f"{self.pages} pages are missing or damaged" if self.pages > 1 else "a page is missing or damaged"
            )
        if self.stopped:
            told.append(f"its data cannot be read to the end ({self.stopped})")
        return ", and ".join(told)


def read_packets(container: Any, stream: Any, losses: Losses) -> Iterator[Any]:
    """The packets of a stream to the end of the data, then an empty packet.

    Counts the packets in `losses`, and notes there why reading ended early.
    """
    packets = container.demux(stream)
    try:
        for packet in packets:
            losses.packets += bool(packet.size)
            yield packet
    except (av.FFmpegError, ValueError) as error:
        losses.stopped = losses.stopped or cause(error)


def decoded(packet: Any, losses: Losses, decode: Callable[[Any], Sequence[Any]] | None = None) -> Sequence[Any]:
    """The frames of a packet, by `decode` or its stream's decoder. An undecodable packet gives no frames, and one loss."""
    try:
        found: Sequence[Any] = packet.decode() if decode is None else decode(packet if packet.size else None)
        return found
    except (av.FFmpegError, ValueError):
        losses.lost += 1
        return ()


def cause(error: Exception) -> str:
    """A few words on why FFmpeg failed."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def note(warnings: list[str], text: str) -> None:
    """Add a sentence to the warnings of a result, once, within their bounds."""
    text = text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 2]} …"
    if text not in warnings and len(warnings) < MOST_WARNINGS:
        warnings.append(text)
