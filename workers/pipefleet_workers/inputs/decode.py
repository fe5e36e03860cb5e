"""Decoding: bytes become the values that a pipeline's preprocess takes, within bounds on pixels, seconds and characters.

    Fetched ─▶ weigh (headers only) ─▶ room in the engine's budget ─▶ decode ─▶ Decoded

The engine's `cpu` threads, or its processes, call `Decoder`. It decodes everything itself: a string in a media position never
reaches a pipeline, which would open URLs and local files. The content decides the codec, never the name. A bad input raises
ItemError.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipefleet.tasks import Media, TaskSpec
from pipefleet.tasks.shared import may_stand_in_a_message
from pipefleet_workers.inputs.declared import CHARACTER, PIXEL, SAMPLE, film_bytes, picture_bytes, recording_bytes
from pipefleet_workers.inputs.pictures.pictures import decode_image
from pipefleet_workers.inputs.sound.recordings import decode_audio
from pipefleet_workers.inputs.tables import decode_table
from pipefleet_workers.inputs.video import KEPT_PICTURES, Clip
from pipefleet_workers.items import Blob, Decoded, Fetched, ItemError, OutgrownError, spend
from pipefleet_workers.process.sizes import text_bytes
from pipefleet_workers.settings import WorkerSettings

STAGE = "decode"
_PICTURES = (Media.IMAGE, Media.IMAGES, Media.IMAGE_PAIR)
_SOUNDS = (Media.AUDIO, Media.AUDIOS)
_FILMS = (Media.VIDEO, Media.VIDEOS)
_TEXTS = (Media.TEXT, Media.TEXTS, Media.PROMPT)
_WIDEST = 4
"""Bytes of the widest character in UTF-8."""
_MEDIA = (*_PICTURES, *_SOUNDS, *_FILMS)
FRAMES = 32
"""Most frames of a video that a model wants, as assumed before its adapter decides."""
SLACK = 1 << 20
"""Bytes by which a declared size may be wrong without a second decoding: containers round their durations."""
_PARTS = {"text": Media.TEXT, "image": Media.IMAGE, "audio": Media.AUDIO, "video": Media.VIDEO}


class Decoder:
    """Decodes the inputs of one task. Thread-safe. `sampling_rate` in Hz is the model's own, for audio."""

    def __init__(self, spec: TaskSpec, settings: WorkerSettings, *, sampling_rate: int | None) -> None:
        self._spec = spec
        self._settings = settings
        self._rate = sampling_rate or 16_000
        self._room = threading.local()
        self._decoders: Mapping[Media, Callable[[Any], Any]] = {
            Media.TEXT: self._text,
            Media.TEXTS: self._texts,
            Media.PROMPT: self._prompt,
            Media.IMAGE: self._image,
            Media.IMAGES: lambda value: _each(value, self._image),
            Media.IMAGE_PAIR: self._image_pair,
            Media.AUDIO: self._audio,
            Media.AUDIOS: lambda value: _each(value, self._audio),
            Media.VIDEO: self._video,
            Media.VIDEOS: lambda value: _each(value, self._video),
            Media.TABLE: self._table,
            Media.LABELS: self._labels,
            Media.DATA: self._data,
        }

    def decode(self, fetched: Fetched) -> Decoded:
        """The decoded value. Raises ItemError: bad_input, bad_media, truncated_media or too_large.

        Raises OutgrownError if its recordings take more bytes than the budget has reserved for it; 0 reserved bytes mean no bound.
        """
        begin = time.perf_counter()
        room = fetched.work.room.decoded
        self._room.whole = self._room.left = room + SLACK if room else None
        fetched.work.warnings.clear()
        self._room.warnings = fetched.work.warnings
        self._room.strict = self._settings.strict_media or fetched.work.parameters.get("strict_media") is True
        self._require_short(fetched.inputs)
        self._require_few_bytes(fetched.inputs)
        self._require_few_media(fetched.inputs)
        self._require_short(fetched.work.item.parameters)
        value = self._value(fetched.inputs)
        spend([fetched.work], STAGE, time.perf_counter() - begin)
        return Decoded(fetched.work, value)

    def texts(self, fetched: Sequence[Fetched]) -> list[Decoded] | None:
        """The decoded values of items that all are short texts without parameters of their own; None for other items."""
        begin, longest = time.perf_counter(), self._settings.max_text_bytes // _WIDEST
        if self._spec.media not in _TEXTS or not all(
            [type(one.inputs) is str and len(one.inputs) <= longest and not one.work.item.parameters for one in fetched]
        ):
            return None
        found = [Decoded(one.work, one.inputs) for one in fetched]
        for one in fetched:
            one.work.warnings.clear()
        spend([one.work for one in fetched], STAGE, (time.perf_counter() - begin) / max(1, len(fetched)))
        return found

    def weigh(self, inputs: Any) -> int:
        """Bytes that an input takes while it is decoded and prepared, by its headers. Decodes nothing, never raises."""
        return self._weigh(inputs, self._spec.media)

    def weights(self, fetched: Sequence[Fetched]) -> list[int]:
        """The weight of each input, with the texts of its parameters.

        Shared parameters count with the first input that has them.
        """
        seen: set[int] = set()
        found = []
        for one in fetched:
            inputs, parameters = one.inputs, one.work.parameters
            size = len(inputs) * CHARACTER if type(inputs) is str else self.weigh(inputs)
            if parameters and id(parameters) not in seen:
                seen.add(id(parameters))
                size += text_bytes(parameters, self._settings.max_text_bytes) * CHARACTER
            found.append(size)
        return found

    def _weigh(self, value: Any, media: Media | None) -> int:
        if isinstance(value, str):
            return len(value) * CHARACTER
        if isinstance(value, Mapping):
            return sum(self._weigh(one, self._media_of(name, media)) for name, one in value.items())
        if isinstance(value, list):
            return sum(self._weigh(one, media) for one in value)
        return self._declared(value, media) if isinstance(value, Blob) else 0

    def _declared(self, blob: Blob, media: Media | None) -> int:
        settings = self._settings
        if media in _PICTURES:
            return min(picture_bytes(blob.content), settings.max_pixels * PIXEL)
        if media in _SOUNDS:
            return recording_bytes(blob, self._rate, settings.max_audio_seconds)
        if media in _FILMS:
            return film_bytes(blob.content, FRAMES, KEPT_PICTURES * settings.max_pixels)
        return min(len(blob.content), settings.max_text_bytes) * CHARACTER

    def _require_short(self, inputs: Any) -> None:
        """Raise ItemError (too_large) if the texts of an input, or of its parameters, take too many bytes together."""
        bound = self._settings.max_text_bytes
        if text_bytes(inputs, bound) > bound:
            raise ItemError(
                "too_large", f"the texts of the input or of its parameters are longer than {bound} bytes", STAGE
            )

    def _require_few_bytes(self, inputs: Any) -> None:
        """Raise ItemError (too_large) if the text objects of an input have too many bytes together."""
        bound = self._settings.max_text_bytes
        if self._text_objects(inputs, self._spec.media) > bound:
            raise ItemError(
                "too_large", f"the texts of the input, as objects, are longer than {bound} bytes together", STAGE
            )

    def _require_few_media(self, inputs: Any) -> None:
        """Raise ItemError (too_large) if the pictures, or the recordings, of one input decode to far too many bytes together."""
        if isinstance(inputs, Blob | str):
            return  # a single medium has a bound of its own
        settings = self._settings
        pictures = KEPT_PICTURES * settings.max_pixels * PIXEL
        sounds = int(settings.max_audio_seconds * self._rate * SAMPLE)
        for kinds, bound, name in ((_PICTURES, pictures, "pictures"), (_SOUNDS, sounds, "recordings")):
            found = self._media_bytes(inputs, self._spec.media, kinds)
            if found > bound:
                text = (
                    f"the {name} of the input decode to {found >> 20} MB together, above the bound of {bound >> 20} MB"
                )
                raise ItemError("too_large", text, STAGE)

    def _media_bytes(self, value: Any, media: Media | None, kinds: Sequence[Media]) -> int:
        if isinstance(value, Blob):
            return self._declared(value, media) if media in kinds else 0
        if isinstance(value, Mapping):
            return sum([self._media_bytes(one, self._media_of(name, media), kinds) for name, one in value.items()])
        return sum([self._media_bytes(one, media, kinds) for one in value]) if isinstance(value, list) else 0

    def _text_objects(self, value: Any, media: Media | None) -> int:
        if isinstance(value, Blob):
            return 0 if media in _MEDIA else len(value.content)
        if isinstance(value, Mapping):
            return sum([self._text_objects(one, self._media_of(name, media)) for name, one in value.items()])
        return sum([self._text_objects(one, media) for one in value]) if isinstance(value, list) else 0

    def _media_of(self, name: Any, media: Media | None) -> Media | None:
        return self._spec.fields.get(name) or self._spec.carried.get(name) or _PARTS.get(name) or media

    def _value(self, inputs: Any) -> Any:
        spec = self._spec
        if spec.fields and isinstance(inputs, Mapping):
            if not inputs or spec.missing(inputs) or set(inputs) - set(spec.fields):
                raise self._bad(f"takes the fields {', '.join(spec.fields)}")
            return {name: self._decoders[spec.fields[name]](one) for name, one in inputs.items()}
        if spec.carried and isinstance(inputs, Mapping):
            if "audio" not in inputs or set(inputs) - set(spec.carried):
                raise self._bad(f"takes a recording, or it with {', '.join(spec.carried)}")
            return {name: self._decoders[spec.carried[name]](one) for name, one in inputs.items()}
        if spec.media is None:
            raise self._bad(f"takes a dict of {', '.join(spec.fields)}")
        return self._decoders[spec.media](inputs)

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, Blob):
            raise self._bad(f"takes a text, not {type(value).__name__}")
        if len(value.content) > self._settings.max_text_bytes:
            raise ItemError("too_large", f"{value.uri} is longer than {self._settings.max_text_bytes} bytes", STAGE)
        try:
            return value.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ItemError("bad_media", f"{value.uri} is not UTF-8 text (byte {error.start})", STAGE) from None

    def _texts(self, value: Any) -> Any:
        several = isinstance(value, list) and (value or self._spec.media is Media.TEXTS)
        return [self._text(one) for one in value] if several else self._text(value)

    def _prompt(self, value: Any) -> Any:
        """A text, or the messages of a chat. A content that was too long for the message has come as an object."""
        if not isinstance(value, list):
            return self._text(value)
        if not value or not all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in value):
            raise self._bad("takes a chat as a list of messages with role and content")
        return [self._message(one) for one in value]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message; every field beside its role and content must be a known text or None."""
        further = {name: one for name, one in message.items() if name not in ("role", "content")}
        decoded = {name: None if one is None else self._text(one) for name, one in further.items()}
        if not all(may_stand_in_a_message(name, one) for name, one in decoded.items()):
            raise self._bad("takes messages of a chat with role and content, and nothing else but texts of known names")
        said = {"role": self._text(message["role"]), "content": self._chat_content(message["content"])}
        return said | decoded

    def _chat_content(self, content: Any) -> Any:
        return [self._chat_part(part) for part in content] if isinstance(content, list) else self._text(content)

    def _chat_part(self, part: Any) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        media = _PARTS.get(kind) if isinstance(kind, str) else None
        if media not in self._spec.chat_media or set(part) != {"type", kind}:
            raise self._bad("takes no such part in a message of a chat")
        return {"type": kind, str(kind): self._decoders[_PARTS[str(kind)]](part[kind])}

    def _image(self, value: Any) -> Any:
        return decode_image(self._blob(value), max_pixels=self._settings.max_pixels)

    def _image_pair(self, value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise self._bad("takes a list of two images")
        return [self._image(one) for one in value]

    def _audio(self, value: Any) -> Any:
        room, blob, seconds = self._room, self._blob(value), self._settings.max_audio_seconds
        try:
            samples = decode_audio(
                blob,
                rate=self._rate,
                max_seconds=seconds,
                most_bytes=room.left,
                strict=room.strict,
                warnings=room.warnings,
            )
        except OutgrownError as error:
            # Ask for at least twice as much; else an input of many recordings would begin again for each of them.
            error.size = max(2 * room.whole, room.whole - room.left + error.size)
            raise
        if room.left is not None:
            room.left -= len(samples) * SAMPLE
        return samples

    def _video(self, value: Any) -> Clip:
        settings = self._settings
        return Clip(
            self._blob(value),
            settings.max_video_frames,
            settings.max_pixels,
            max_film_pixels=settings.max_video_pixels,
            max_seconds=settings.stage_timeout / 2,  # above `stage_timeout` the watchdog would end the process
            strict=self._room.strict,
            warnings=self._room.warnings,
        )

    def _table(self, value: Any) -> Any:
        return decode_table(value, max_bytes=self._settings.max_text_bytes)

    def _labels(self, value: Any) -> Any:
        value = self._data(value)
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            return value
        raise self._bad("takes labels as a list of texts or one text with commas")

    def _data(self, value: Any) -> Any:
        """JSON unchanged; a value that was too long for the message has come as an object."""
        if not isinstance(value, Blob):
            return value
        try:
            return json.loads(self._text(value))
        except (ValueError, RecursionError):
            raise ItemError("bad_media", f"{value.uri} is not JSON", STAGE) from None

    def _blob(self, value: Any) -> Blob:
        if not isinstance(value, Blob):
            raise self._bad("takes an s3:// reference, not inline data")
        return value

    def _bad(self, what: str) -> ItemError:
        return ItemError("bad_input", f"{self._spec.name} {what}", STAGE)


def _each(value: Any, decode: Callable[[Any], Any]) -> Any:
    """One medium, or each of a list."""
    return [decode(one) for one in value] if isinstance(value, list) else decode(value)
