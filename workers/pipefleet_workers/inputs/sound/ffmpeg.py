"""Sound by FFmpeg: the track that `ffmpeg` would choose, decoded to the end of the data.

`recordings` passes a file, a `Track` for the frames, and `Losses`. Packets that cannot be decoded are skipped and counted. A file
that FFmpeg cannot open raises CannotOpenError; libsndfile then gets it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av

from pipefleet_workers.inputs.formats import AUDIO_FORMATS
from pipefleet_workers.inputs.losses import Losses, cause, decoded, read_packets
from pipefleet_workers.inputs.sound.joined import parts
from pipefleet_workers.inputs.sound.tracks import STAGE, Samples, Track
from pipefleet_workers.items import Blob, ItemError

_SECOND_CHOICE = {"amrnb": "libopencore_amrnb", "amrwb": "libopencore_amrwb"}
"""Other decoders, for packets that FFmpeg's own decoders cannot decode: the frames of silence (DTX) that phones send."""
_PHONE_SECONDS = 0.02
"""Seconds of a phone's packet."""
_TAGS = (b"ID3", b"TAG", b"APETAGEX", b"LYRICSBEGIN")
"""First bytes of a tag between the parts of a joined file. A tag is no packet."""
_DEFAULT = 5_000_000
"""As in ffmpeg's choice of a track: the default track wins over a track with more channels."""
_Decode = Callable[[Any], Sequence[Any]]


class CannotOpenError(Exception):
    """FFmpeg does not know the file, or finds no sound in it; `refusal` gives the reason."""

    def __init__(self, refusal: ItemError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def read_sound(blob: Blob, track: Track, losses: Losses) -> Samples:
    """The samples of a file through `track`. Raises CannotOpenError, and the track's ItemErrors."""
    _read(blob, track, losses)
    if not track.seconds:
        raise CannotOpenError(ItemError("bad_media", f"{blob.uri} holds no audio that can be decoded", STAGE))
    return track.end()


def _read(blob: Blob, track: Track, losses: Losses) -> None:
    """Add a file to the track; a joined file part by part."""
    first, *others = parts(blob.content)
    _read_one(blob, first, track, losses)
    for part in others:
        try:
            _read_one(blob, part, track, losses)
        except CannotOpenError as error:
            losses.stopped = losses.stopped or str(error.refusal)


def _read_one(blob: Blob, content: bytes, track: Track, losses: Losses) -> None:
    """Add one file to the track: the stream that `ffmpeg` would take; if that stream is empty, the next stream."""
    before, empty = losses.packets, list[int]()
    while not _read_stream(blob, content, track, losses, empty) and losses.packets == before:
        pass


def _read_stream(blob: Blob, content: bytes, track: Track, losses: Losses, empty: list[int]) -> bool:
    """Add the frames of the best stream outside `empty`, and its index to `empty`. Whether it was the last stream."""
    try:
        with av.open(io.BytesIO(content), "r", options={"format_whitelist": AUDIO_FORMATS}) as container:
            known = [one for one in container.streams.audio if one.index not in empty]
            stream, order = chosen(known)
            if stream is None:
                raise CannotOpenError(ItemError("bad_media", f"{blob.uri} has no audio track", STAGE))
            decode = _second_choice(content, stream, track.most_seconds)
            for frame in frames(container, stream, losses, decode):
                track.add(frame, order)
            empty.append(stream.index)
            return len(known) == 1
    except av.error.EOFError:
        raise CannotOpenError(ItemError("truncated_media", f"{blob.uri} ends too early", STAGE)) from None
    except (av.FFmpegError, ValueError) as error:
        text = f"{blob.uri} cannot be read as audio: {cause(error)}"
        raise CannotOpenError(ItemError("bad_media", text, STAGE)) from None


def chosen(streams: Sequence[Any]) -> tuple[Any, str | None]:
    """The track that `ffmpeg` takes, and the order of its channels.

    The default track comes first, then the track with most channels, then the first track; None if no track has channels. The order
    is None for FFmpeg's own layouts. It is needed for all others, whose frames only give the number of channels.
    """
    orders = [None if one.codec_context is None else _own_order(one.codec_context) for one in streams]
    scores = [_score(one) for one in streams]
    if not any(scores):
        return None, None
    best = scores.index(max(scores))
    return streams[best], orders[best]


def _score(stream: Any) -> int:
    channels = 0 if stream.codec_context is None else int(stream.codec_context.layout.nb_channels)
    return channels and channels + bool(stream.disposition & av.stream.Disposition.default) * _DEFAULT


def _own_order(context: Any) -> str | None:
    """The names of channels in an order that is no layout of FFmpeg; None for a layout. `context` then keeps only their number.

    PyAV frees a list of channels once for each object made of it, which would end the process.
    """
    shared = context.layout
    count = f"{shared.nb_channels} channels"
    if not shared.name.startswith(f"{count} ("):
        return None
    context.layout = count
    return str(shared.name.removeprefix(f"{count} (").removesuffix(")"))


def frames(container: Any, stream: Any, losses: Losses, decode: _Decode | None = None) -> Iterator[Any]:
    """The frames of a stream to the end of the data; packets that cannot be decoded or read are counted in `losses`."""
    for packet in read_packets(container, stream, losses):
        before = losses.lost
        yield from decoded(packet, losses, decode)
        if losses.lost > before and bytes(packet)[:16].startswith(_TAGS):
            losses.lost, losses.packets = before, losses.packets - 1


def _second_choice(content: bytes, stream: Any, most_seconds: float) -> _Decode | None:
    """Another decoder, if FFmpeg's own cannot decode all packets."""
    name = _SECOND_CHOICE.get(stream.codec_context.name)
    if name is None or name not in av.codecs_available:
        return None
    losses = Losses()
    with av.open(io.BytesIO(content), "r", options={"format_whitelist": AUDIO_FORMATS}) as container:
        for _ in frames(container, chosen(container.streams.audio)[0], losses):
            if losses.lost or losses.packets * _PHONE_SECONDS > most_seconds:
                break
    return _decoder(name) if losses.lost else None


def _decoder(name: str) -> _Decode:
    context: Any = av.CodecContext.create(name, "r")
    decode: _Decode = context.decode
    return decode
