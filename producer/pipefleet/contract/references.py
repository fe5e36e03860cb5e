"""References to objects: `StorageRef`, and the grammar of `s3://` URIs. No network.

On the wire a reference is a JSON object with the reserved key `$ref`. It may stand anywhere inside of a job's inputs:
`{"$ref": "s3://media/cat.jpg", "etag": "…", "size": 12345, "type": "image/jpeg"}`. Both halves of the system parse references
and URIs here. A bad URI raises InputError; a bad reference raises ContractError.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipefleet.errors import ContractError, InputError

REF_KEY = "$ref"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
MAX_KEY_BYTES = 1024  # S3's own bound
_ETAG = re.compile(r"[\x20-\x7e]{0,256}")
"""Characters that a header of HTTP may hold."""
_MAX_TYPE = 256
_MAX_SIZE = 1 << 53
MAX_DEPTH = 100
"""Levels of lists and objects in an input; Python itself ends at a few hundred."""


@dataclass(frozen=True, slots=True)
class StorageRef:
    """One object in object storage. `size` is in bytes; `etag` is opaque and pins one version of the object."""

    uri: str
    etag: str | None = None
    size: int | None = None
    type: str | None = None

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return split_uri(self.uri)[0]

    @property
    def key(self) -> str:
        """The object's key, without a leading slash."""
        return split_uri(self.uri)[1]

    def to_json(self) -> dict[str, Any]:
        """The wire form; fields that are not known are left out."""
        fields = {"etag": self.etag, "size": self.size, "type": self.type}
        return {REF_KEY: self.uri, **{name: value for name, value in fields.items() if value is not None}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StorageRef:
        """The reverse of `to_json`. Raises ContractError for anything else."""
        unknown = set(value) - {REF_KEY, "etag", "size", "type"}
        uri, etag, size, media_type = (value.get(name) for name in (REF_KEY, "etag", "size", "type"))
        texts = all(one is None or isinstance(one, str) for one in (etag, media_type))
        whole = size is None or (type(size) is int and 0 <= size <= _MAX_SIZE)
        if unknown or not isinstance(uri, str) or not texts or not whole:
            raise ContractError(
                f"not a storage reference: it holds {REF_KEY} and, at most, etag and type (texts) and size (bytes)"
            )
        if not _ETAG.fullmatch(etag or "") or len(media_type or "") > _MAX_TYPE:
            raise ContractError(
                "not a storage reference: etag is of up to 256 printable ASCII characters, type of 256 at most"
            )
        try:
            split_uri(uri)
        except InputError as error:
            raise ContractError(str(error)) from None
        return cls(uri, etag, size, media_type)

    @classmethod
    def of(cls, uri: str) -> StorageRef:
        """A reference to `uri` with the media type of its suffix. Raises InputError for a bad URI."""
        split_uri(uri)
        return cls(uri, type=mimetypes.guess_type(uri)[0])


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/key` as `(bucket, key)`; the key may be empty. Raises InputError, which names the fault."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme != "s3":
        raise InputError(f"not an s3:// URI: {uri[:80]!r}")
    bucket, _, key = rest.partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise InputError(f"not a bucket name in {uri[:80]!r}: 3 to 63 of a-z, 0-9, '.', '-'")
    if len(key.encode(errors="replace")) > MAX_KEY_BYTES or "\x00" in key or not _has_utf8(key):
        raise InputError(
            f"not an object key in {uri[:80]!r}: longer than {MAX_KEY_BYTES} bytes, with a NUL, or not UTF-8"
        )
    return bucket, key


def _has_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_uri(value: object) -> bool:
    """True for a string that begins with `s3://`; `split_uri` checks the rest. Keys may hold spaces."""
    return isinstance(value, str) and value.startswith("s3://")


def is_text_uri(value: object) -> bool:
    """True for one line that begins with `s3://`, where a text may stand too. A text that only mentions a URI is not a URI."""
    return isinstance(value, str) and is_uri(value) and len(value.splitlines()) == 1


def is_ref(value: object) -> bool:
    """True for the wire form of a StorageRef."""
    return not isinstance(value, str) and isinstance(value, Mapping) and REF_KEY in value


def join_uri(prefix: str, *parts: str) -> str:
    """`prefix` and `parts` joined by exactly one slash each."""
    return "/".join([prefix.rstrip("/"), *(part.strip("/") for part in parts)])


def directory_uri(uri: str) -> str:
    """`uri` as a prefix: checked, and with exactly one slash at its end."""
    split_uri(uri)
    return uri.rstrip("/") + "/"


def map_refs(value: Any, change: Callable[[StorageRef], Any], *, depth: int = MAX_DEPTH) -> Any:
    """A copy of a JSON value in which every reference is replaced by what `change` returns for it.

    Raises ContractError for a malformed reference, and for a value of more than `depth` levels.
    """
    if depth < 0:
        raise ContractError(f"the input is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):  # most values are strings, and this test is quick
        return value
    if is_ref(value):
        return change(StorageRef.from_json(value))
    if isinstance(value, Mapping):
        return {key: map_refs(item, change, depth=depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_refs(item, change, depth=depth - 1) for item in value]
    return value


def refs_in(value: Any) -> list[StorageRef]:
    """Every reference inside a JSON value, in order."""
    found: list[StorageRef] = []
    map_refs(value, found.append)
    return found
