"""`InputPreparer`: one input as a user passes it becomes JSON with references in the place of media.

It has a method for each kind of `Media`. Clients call `prepare` and `spill` before they queue; sources call them for each item.
Local files and values are uploaded on the way. InputError says that the task does not take the input.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipefleet.contract.messages import encode_json
from pipefleet.contract.references import StorageRef, is_ref, is_text_uri, is_uri, refs_in
from pipefleet.errors import InputError, UsageError, nearest
from pipefleet.inputs.cells import cell_content, is_cell
from pipefleet.inputs.pictures import is_picture, picture_of_array
from pipefleet.inputs.recordings import extra_of, has_samples, is_samples, rate_of, recording_of, stride_of
from pipefleet.inputs.tables import columns_of, distinct
from pipefleet.inputs.uploads import TEXT_TYPE, DryUploader, Uploader
from pipefleet.storage.store import ObjectStore
from pipefleet.tasks import Media, TaskSpec
from pipefleet.tasks.requirements import Known
from pipefleet.tasks.shared import may_stand_in_a_message
from pipefleet.tasks.values import plain

_PARTS = {"image": Media.IMAGE, "audio": Media.AUDIO, "video": Media.VIDEO}
"""Types of parts of a chat's message that hold media. A part holds its medium under the type's name or `url`."""
_VALUES = (Media.DATA, Media.LABELS)
_PICTURES = (Media.IMAGE, Media.IMAGES)
_NAMES = {"image": ("image", "url", "path", "base64")}
"""Names under which a part of a chat may hold its medium, if they differ from the type's name, `url` and `path`."""
_MOST_LABELS = 1000
_MOST_TEXTS = 100_000
"""Most words of one pre-tokenised text, or questions about one table."""


class InputPreparer:
    """Turns the inputs of one task into JSON with references. Thread-safe; uploads through `store`."""

    def __init__(
        self,
        spec: TaskSpec,
        store: ObjectStore,
        prefix: str,
        *,
        inline_bytes: int,
        uploader: Uploader | None = None,
        known: Known | None = None,
    ) -> None:
        self.spec = spec
        self.known = known or Known()
        self._store = store
        self._prefix = prefix
        self._inline_bytes = inline_bytes
        self._upload = uploader or Uploader(store, prefix)
        self._kinds: Mapping[Media, Callable[[Any], Any]] = {
            Media.TEXT: self._text,
            Media.TEXTS: self._texts,
            Media.PROMPT: self._prompt,
            Media.IMAGE: self._image,
            Media.IMAGES: lambda value: self._several(value, "image", self._image),
            Media.IMAGE_PAIR: self._image_pair,
            Media.AUDIO: self._audio,
            Media.AUDIOS: lambda value: self._several(value, "recording", self._audio),
            Media.VIDEO: self._media,
            Media.VIDEOS: lambda value: self._several(value, "video", self._media),
            Media.TABLE: self._table,
            Media.LABELS: self._labels,
            Media.DATA: self._data,
        }

    def prepare(self, value: Any, parameters: Mapping[str, Any] | None = None) -> Any:
        """The JSON form of one input, which may have `parameters` of its own.

        Raises InputError for a kind that the task does not take; InputError or ParameterError for an input that can only fail.
        """
        if self.spec.fields and not isinstance(value, str) and isinstance(value, Mapping):
            value = self._in_json(self.spec.given(value))
        self.spec.require(value, self.known.of_item(parameters))
        if is_ref(value):
            return StorageRef.from_json(value).to_json()
        if "text_pair" in self.spec.fields and is_pair(value):
            value = dict(zip(("text", "text_pair"), value if isinstance(value, tuple) else value[0], strict=True))
        has_fields = bool(self.spec.fields) and not isinstance(value, str) and isinstance(value, Mapping)
        if has_fields and not (self.spec.media in _PICTURES and is_cell(value)):
            return self._prepare_fields(value)
        if self.spec.media is None:
            raise InputError(f"{self.spec.name} takes {_shown(self.spec)}, not {_kind(value)}")
        return self._kinds[self.spec.media](value)

    def spill(self, prepared: Any) -> Any:
        """`prepared`, with texts that are too long for a message moved into the store."""
        if len(encode_json(prepared).encode()) <= self._inline_bytes:
            return prepared
        if isinstance(prepared, str):
            return self._upload.content(prepared.encode(), "txt", TEXT_TYPE)
        if isinstance(prepared, Mapping) and not is_ref(prepared):
            return {name: self._spill_field(name, item) for name, item in prepared.items()}
        if isinstance(prepared, list):
            return [self.spill(item) for item in prepared]
        return prepared

    def dry(self) -> InputPreparer:
        """A preparer that refuses the same inputs, but reads no local file and uploads nothing."""
        return InputPreparer(
            self.spec,
            self._store,
            self._prefix,
            inline_bytes=self._inline_bytes,
            uploader=DryUploader(self._prefix),
            known=self.known,
        )

    def _spill_field(self, name: str, item: Any) -> Any:
        """A field after spilling. Long data and tables move whole, as JSON; texts inside of chats move one by one."""
        whole = {**self.spec.fields, **self.spec.carried}.get(name) in (Media.DATA, Media.TABLE, Media.LABELS)
        text = encode_json(item)
        if whole and not is_ref(item) and len(text.encode()) > self._inline_bytes:
            return self._upload.content(text.encode(), "json", "application/json")
        return self.spill(item)

    def _prepare_fields(self, value: Mapping[str, Any]) -> dict[str, Any]:
        fields = self.spec.fields
        for name in value:
            if name not in fields:
                known = ", ".join(fields)
                raise InputError(
                    f"{self.spec.name} takes no field {str(name)[:40]!r}{nearest(str(name), fields)}; it takes {known}"
                )
        if missing := self.spec.missing(value):
            raise InputError(f"{self.spec.name} takes {_shown(self.spec)}; {', '.join(missing)} is missing")
        return {name: self._kinds[fields[name]](item) for name, item in value.items()}

    def _in_json(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """The fields, with data and labels of numpy, torch and pandas as JSON."""
        fields = self.spec.fields
        return {name: in_json(name, one) if fields.get(name) in _VALUES else one for name, one in value.items()}

    def _text(self, value: Any) -> Any:
        if is_text_uri(value):
            return StorageRef.of(value.rstrip("\r\n")).to_json()
        if isinstance(value, str):
            return value
        if isinstance(value, os.PathLike):
            return self._upload.file(value)
        if is_ref(value):
            return StorageRef.from_json(value).to_json()
        raise InputError(f"{self.spec.name} takes texts, s3:// URIs of texts or Path objects, not {_kind(value)}")

    def _texts(self, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return self._text(value)
        least = (
            0 if self.spec.media is Media.TEXTS else 1
        )  # a text of no words has no entities; no questions have no answer
        if not least <= len(value) <= _MOST_TEXTS:
            raise InputError(f"{self.spec.name} takes lists of {least} to {_MOST_TEXTS} texts, not of {len(value)}")
        return [self._words(one) for one in value]

    def _words(self, value: Any) -> str:
        """A text of a chat or of a list of texts. It is never a reference, even if it looks like a URI."""
        if isinstance(value, str):
            return value
        where = "in a list" if self.spec.media is not Media.PROMPT else "as role and content of a message"
        raise InputError(f"{self.spec.name} takes texts {where}, not {_kind(value)}")

    def _prompt(self, value: Any) -> Any:
        return self._chat(value) if isinstance(value, list | tuple) else self._text(value)

    def _chat(self, messages: Sequence[Any]) -> list[dict[str, Any]]:
        if not messages or not all(map(is_message, messages)):
            raise InputError(f"{self.spec.name} takes chats as lists of messages {{role, content}}")
        return [self._message(one) for one in messages]

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        role, content = self._words(message["role"]), self._chat_content(message["content"])
        further = {name: one for name, one in message.items() if name not in ("role", "content")}
        if not all(may_stand_in_a_message(name, one) for name, one in further.items()):
            raise InputError(
                f"{self.spec.name} takes texts such as a name, or None, beside role and content of a message; write others, "
                "such as calls of tools, into its content"
            )
        return {"role": role, "content": content, **further}

    def _chat_content(self, content: Any) -> Any:
        if not isinstance(content, list | tuple):
            return self._words(content)
        return [self._chat_part(part) for part in content]

    def _chat_part(self, part: Any) -> dict[str, Any]:
        part = plain_part(part)
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and set(part) == {"type", "text"}:
            return {"type": "text", "text": self._words(part["text"])}
        media = _PARTS.get(str(kind))
        if media not in self.spec.chat_media:
            known = ", ".join("text" if one is Media.TEXT else str(one) for one in self.spec.chat_media)
            raise InputError(f"{self.spec.name} takes {known} in the parts of a message, not {str(kind)[:40]!r}")
        names = set(part) - {"type"}
        if len(names) != 1 or not names <= set(_NAMES.get(str(kind), (kind, "url", "path"))):
            raise InputError(f"a part of type {kind} is {{type, {kind}}} and holds nothing else")
        return {"type": kind, str(kind): self._kinds[_PARTS[str(kind)]](part[names.pop()])}

    def _image(self, value: Any) -> Any:
        if is_picture(value):
            return self._upload.image(value)
        if isinstance(value, str) and not is_uri(value):
            return self._upload.picture(value)
        if hasattr(value, "__array__") and not isinstance(value, str):  # numpy's texts have this attribute too
            return self._upload.image(picture_of_array(value))
        return self._media(value)

    def _several(self, value: Any, name: str, kind: Callable[[Any], Any]) -> Any:
        """One medium, or the list of all media of one text. A list of one list is a batch of one text, and gives the inner list."""
        if not isinstance(value, list | tuple):
            return kind(value)
        if len(value) == 1 and isinstance(value[0], list | tuple):
            (value,) = value
        if not value:
            raise InputError(f"{self.spec.name} takes one {name} or more in a list, not none; leave the list out")
        return [kind(one) for one in value]

    def _image_pair(self, value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise InputError(f"{self.spec.name} takes lists of two images, not {_kind(value)}")
        return [self._image(one) for one in value]

    def _audio(self, value: Any) -> Any:
        if is_ref(value) or is_cell(value):
            return self._media(value)
        if isinstance(value, Mapping) and "audio" in value and self.spec.carried and not has_samples(value):
            return self._carried(value)
        if not isinstance(value, Mapping) and not is_samples(value):
            return self._media(value)
        recording = recording_of(value, extras=bool(self.spec.carried))
        reference = self._upload.samples(recording)
        beside: dict[str, Any] = {} if recording.extra is None else {"extra": recording.extra}
        if recording.stride is not None:
            beside |= {"stride": list(recording.stride), "sampling_rate": recording.rate}
        return {"audio": reference, **beside} if beside else reference

    def _carried(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """A recording with its stride and extra keys, in the form of the wire and of a run's list of failures."""
        for name in value:
            if name not in self.spec.carried:
                known = ", ".join(self.spec.carried)
                raise InputError(f"a recording with {{audio}} has no field {str(name)[:40]!r}; it has {known}")
        prepared = {**value, "audio": self._media(value["audio"])}
        stride = stride_of(value.get("stride"))
        if stride is not None:
            prepared |= {"stride": list(stride), "sampling_rate": rate_of(value.get("sampling_rate"))}
        if not isinstance(value.get("extra", {}), Mapping):
            raise InputError("`extra` of a recording is an object of keys and values")
        return prepared | ({"extra": extra_of(value["extra"])} if "extra" in value else {})

    def _media(self, value: Any) -> Any:
        """Media of any kind: a URI, a reference, a local file, bytes, an open file."""
        if is_uri(value):
            return StorageRef.of(value.rstrip("\r\n")).to_json()
        if is_ref(value):
            return StorageRef.from_json(value).to_json()
        if is_cell(value):
            value = cell_content(value)
        if isinstance(value, str | os.PathLike):
            return self._upload.file(value)
        if isinstance(value, bytes | bytearray | memoryview):
            if not len(value) or getattr(value, "itemsize", 1) != 1:
                raise InputError(
                    f"{self.spec.name} takes the bytes of a file; those given are empty, or hold larger numbers than bytes"
                )
            return self._upload.content(bytes(value))
        if is_file(value):
            return self._upload.opened(value)
        raise InputError(
            f"{self.spec.name} takes s3:// URIs, local paths, bytes or {self.spec.media or 'media'} objects, "
            f"not {_kind(value)}"
        )

    def _table(self, value: Any) -> Any:
        """Columns of texts: a pandas table, a dict of columns, a list of rows, or a CSV or JSON file with those."""
        if isinstance(value, str | os.PathLike) or is_ref(value):
            return self._media(value)
        if is_table(value):
            names = distinct(list(map(str, value.columns)))
            value = {name: value.iloc[:, place].tolist() for place, name in enumerate(names)}
        if isinstance(value, Mapping):
            value = {name: cells.tolist() if hasattr(cells, "tolist") else cells for name, cells in value.items()}
        columns = columns_of(value)
        if columns is None:
            raise InputError(
                "a table is a pandas table, a dict of columns of one length, a list of rows, or a CSV or JSON file, and not empty"
            )
        return columns

    def _labels(self, value: Any) -> Any:
        if isinstance(value, str):
            return value
        texts = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        if not texts or not 0 < len(value) <= _MOST_LABELS:
            raise InputError(f"labels are a list of 1 to {_MOST_LABELS} texts, or one text with commas")
        return list(value)

    def _data(self, value: Any) -> Any:
        refs_in(value)
        return value


def in_json(name: str, value: Any) -> Any:
    """A field's value as JSON. Raises InputError for a value without a JSON form."""
    try:
        found = plain(value)
        encode_json(found)
        return found
    except RecursionError:
        raise InputError(f"{name} is nested too deeply") from None
    except UsageError as error:
        raise InputError(f"{name} cannot be sent: {error}") from None


def is_message(value: object) -> bool:
    """True for a message of a chat, by transformers' rule. A list that begins with a message is a chat, not a batch."""
    return isinstance(value, Mapping) and "role" in value and "content" in value


def is_pair(value: object) -> bool:
    """True for a text with its pair, as a tuple or as transformers' `[[text, pair]]`. A flat list of two texts is no pair."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = tuple(value[0])
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(one, str | os.PathLike) for one in value)


def plain_part(part: Any) -> Any:
    """A part of a chat's message without fields that are None, and with OpenAI's `image_url` as a part of type image."""
    if not isinstance(part, Mapping):
        return part
    part = {name: one for name, one in part.items() if one is not None}
    if part.get("type") != "image_url" or set(part) != {"type", "image_url"}:
        return part
    held = part["image_url"]
    if not isinstance(held, Mapping):
        return {"type": "image", "url": held}
    if "url" not in held or set(held) - {"url", "detail"} or held.get("detail") not in (None, "auto"):
        raise InputError(
            "a part of type image_url is {type, image_url: {url}}; a `detail` other than auto is not known here"
        )
    return {"type": "image", "url": held["url"]}


def is_file(value: object) -> bool:
    """True for an open file, a file in memory, or a response of HTTP. Each is one input, though it gives lines."""
    return callable(getattr(value, "read", None))


def is_table(value: object) -> bool:
    """True for a table of pandas, which is one input. `iloc` tells it from sets of `datasets`, which have columns too."""
    return hasattr(value, "columns") and hasattr(value, "iloc")


def _shown(spec: TaskSpec) -> str:
    optional = [name for name in spec.fields if name not in spec.required]
    return f"a dict of {', '.join(spec.required)}" + (f" and, if wanted, {', '.join(optional)}" if optional else "")


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
