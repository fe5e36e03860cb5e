"""Looks at local paths: a file, a folder, a pipe, or nothing.

An input may be a text and not a path, so a name that no file system takes is no error: nothing lies there. Sources, uploads and
`pipefleet submit` call these functions.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_OPEN_ALREADY = ("/dev/", "/proc/")
"""Where a shell puts the pipes that it has opened for a process: `/dev/stdin`, `<(command)`."""


def is_file(name: str | os.PathLike[str]) -> bool:
    """Whether it is an ordinary file, or a link to one."""
    return stat.S_ISREG(_mode(name))


def is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    return stat.S_ISDIR(_mode(name))


def is_readable_once(name: str) -> bool:
    """Whether it is a file, or a pipe that is open already."""
    return is_file(name) or (stat.S_ISFIFO(_mode(name)) and name.startswith(_OPEN_ALREADY))


def fault(name: str | os.PathLike[str]) -> str | None:
    """Why nothing there can be read as a file, or None: reading a pipe or a device may never end."""
    mode, text = _mode(name), os.fspath(name)
    if not text:
        return "an empty text names no file"
    if stat.S_ISFIFO(mode) and not text.startswith(_OPEN_ALREADY):
        return "it is a pipe, not a file"
    return "it is a device, not a file" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode) else None


def why_no_source(name: str) -> str:
    """The fault of a name that should name a folder or a manifest, as the beginning of a sentence."""
    shown = repr(name[:200])
    if not name:
        return f"no such source {shown}"
    try:
        mode = Path(name).stat().st_mode
    except PermissionError as error:
        return f"{shown} cannot be read ({error.strerror})"
    except (OSError, ValueError):
        return f"no such source {shown}"
    return f"{shown} is no manifest" if stat.S_ISREG(mode) else f"{shown} is no file that can be read twice"


def _mode(name: str | os.PathLike[str]) -> int:
    """The kind of what stands there, as `os.stat` has it; 0 where nothing does, or where nobody may look."""
    try:
        return Path(name).stat().st_mode if os.fspath(name) else 0
    except (OSError, ValueError):  # a component that is too long, a NUL
        return 0
