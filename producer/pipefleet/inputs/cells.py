"""Cells of a column of `datasets` that is not decoded, for pictures and for sound: `{"bytes", "path"}`, or one of the two."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipefleet.errors import InputError

_KEYS = {"bytes", "path"}


def is_cell(value: object) -> bool:
    """Whether it is such a cell."""
    return isinstance(value, Mapping) and bool(value) and set(value) <= _KEYS


def cell_content(value: Mapping[str, Any]) -> Any:
    """The file's bytes, or where there are none its path. Raises InputError where a cell holds neither, or other types."""
    content, path = value.get("bytes"), value.get("path")
    if content is not None:
        if not isinstance(content, bytes | bytearray | memoryview):
            raise InputError(
                f"the key 'bytes' of an input holds bytes or None, not a value of type {type(content).__name__}"
            )
        return content
    if isinstance(path, str | os.PathLike) and os.fspath(path):
        return path
    raise InputError("an input of `bytes` and `path` holds neither the bytes of a file nor the path of one")
