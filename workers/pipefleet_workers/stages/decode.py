"""decode: bytes become what a pipeline's preprocess takes, within bounds on pixels, seconds and characters.

The engine decodes everything itself: a string in a media position never reaches a pipeline, which would open URLs and local
files. Codecs are told from the content, never from the name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pipefleet.tasks import Media, TaskSpec
from pipefleet_workers.items import Blob, Decoded, Fetched, ItemError
from pipefleet_workers.media.audio import decode_audio
from pipefleet_workers.media.images import decode_image
from pipefleet_workers.settings import WorkerSettings

STAGE = "decode"


class Decoder:
    """Decodes the inputs of one task. Thread-safe. `sampling_rate` in Hz is the model's own, for audio."""

    def __init__(self, spec: TaskSpec, settings: WorkerSettings, *, sampling_rate: int | None) -> None:
        self._spec = spec
        self._settings = settings
        self._rate = sampling_rate or 16_000
        self._decoders: Mapping[Media, Callable[[Any], Any]] = {
            Media.TEXT: self._text,
            Media.PROMPT: self._prompt,
            Media.IMAGE: self._image,
            Media.AUDIO: self._audio,
        }

    def decode(self, fetched: Fetched) -> Decoded:
        """The decoded value. Raises ItemError: bad_input, bad_media, truncated_media or too_large."""
        begin = time.perf_counter()
        value = self._value(fetched.inputs)
        fetched.work.seconds[STAGE] = time.perf_counter() - begin
        return Decoded(fetched.work, value)

    def _value(self, inputs: Any) -> Any:
        if self._spec.fields and isinstance(inputs, Mapping):
            unknown = set(inputs) - set(self._spec.fields)
            if unknown or not inputs:
                raise ItemError(
                    "bad_input", f"{self._spec.name} takes the fields {', '.join(self._spec.fields)}", STAGE
                )
            return {name: self._decoders[self._spec.fields[name]](one) for name, one in inputs.items()}
        return self._decoders[self._spec.media](inputs)

    def _text(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, Blob):
            raise ItemError("bad_input", f"{self._spec.name} takes a text, not {type(value).__name__}", STAGE)
        if len(value.content) > self._settings.max_text_bytes:
            raise ItemError("too_large", f"{value.uri} is longer than {self._settings.max_text_bytes} bytes", STAGE)
        try:
            return value.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ItemError("bad_media", f"{value.uri} is not UTF-8 text (byte {error.start})", STAGE) from None

    def _prompt(self, value: Any) -> Any:
        """A text, or the messages of a chat; a content that was too long for the message has come as an object."""
        if not isinstance(value, list):
            return self._text(value)
        if not value or not all(isinstance(one, Mapping) and set(one) == {"role", "content"} for one in value):
            raise ItemError("bad_input", "a chat is a list of messages with role and content", STAGE)
        return [{name: self._text(part) for name, part in one.items()} for one in value]

    def _image(self, value: Any) -> Any:
        return decode_image(self._blob(value), max_pixels=self._settings.max_pixels)

    def _audio(self, value: Any) -> Any:
        return decode_audio(self._blob(value), rate=self._rate, max_seconds=self._settings.max_audio_seconds)

    def _blob(self, value: Any) -> Blob:
        if not isinstance(value, Blob):
            raise ItemError("bad_input", f"{self._spec.name} takes an s3:// reference, not inline data", STAGE)
        return value
