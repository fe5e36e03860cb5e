"""Private files and folders of the data directory, readable only by their owner; a file is written whole or not at all.

The modules of this package call it for their files and folders. A folder that cannot be written raises OSError; a value with a line
break raises ValueError.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_private(path: Path, text: str) -> None:
    """Put `text` at `path` with mode 0600, by a rename, so that no reader sees a partial file.

    An existing file is replaced, its mode included. Raises OSError when the folder is missing or read-only.
    """
    neighbour = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(neighbour, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        neighbour.replace(path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise


def private_folder(path: Path) -> Path:
    """Create `path` with its parents (0700) and return it; an existing folder keeps its mode."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def env_lines(values: dict[str, str]) -> str:
    """`values` as unquoted `KEY=VALUE` lines. Raises ValueError for a value with a line break."""
    broken = [name for name, value in values.items() if "\n" in value or "\r" in value]
    if broken:
        raise ValueError(f"{broken[0]} contains a line break and cannot be written as KEY=VALUE")
    return "".join(f"{name}={value}\n" for name, value in values.items())
