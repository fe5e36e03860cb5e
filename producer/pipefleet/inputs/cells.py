"""Cells of `datasets` columns that are not decoded: `{"bytes", "path"}` or one of the two, for pictures and for sound.

`prepare` calls this. The bytes or the path go out; a cell with neither raises InputError.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pipefleet.errors import InputError

_KEYS = {"bytes", "path"}


def is_cell(value: object) -> bool:
    """Whether `value` is such a cell."""
    return isinstance(value, Mapping) and bool(value) and set(value) <= _KEYS


def cell_content(value: Mapping[str, Any]) -> Any:
    """The bytes of a cell, or else its path. Raises InputError if it holds neither, or values of other types."""
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
