"""The JSON file of a benchmark: the machine, and a record for each section, written after every run and gone on with later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYOUT = 2
"""Raised when a file of before cannot be read any more."""
COMPARED = ("cpu", "cores", "memory_gib", "gpu", "python", "versions", "settings")


class UnsuitableFile(ValueError):
    """A file that cannot be gone on with; the message says why in one sentence."""


class Figures:
    """What was measured so far. `sections` is written to `path` by `save`."""

    def __init__(self, path: Path, machine: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.machine = machine
        self.sections = sections

    @classmethod
    def resumed(cls, path: Path, machine: dict[str, Any]) -> Figures:
        """Go on with `path`; a file that does not exist is an empty one. Raises UnsuitableFile."""
        if not path.exists():
            return cls(path, machine, {})
        found = read(path)
        differing = [name for name in COMPARED if found["machine"].get(name) != machine[name]]
        if differing:
            raise UnsuitableFile(f"{path} was measured with another {' and '.join(differing)}: write to another file")
        return cls(path, machine, found["sections"])

    def section(self, name: str, stamp: dict[str, Any], facts: dict[str, Any], *, again: bool) -> dict[str, Any]:
        """The record of a section: what the file has of it, if it was measured in the same way at the same commit.

        `facts` say how it is measured (counts of items and the like).
        """
        record = self.sections.get(name)
        if record is not None and not again:
            if record["facts"] == facts and record["stamp"]["commit"] == stamp["commit"]:
                return record
            print(f"  {name} in {self.path} was measured with other counts or another commit: it is measured anew")
        fresh = self.sections[name] = {"stamp": stamp, "facts": facts}
        return fresh

    def save(self) -> None:
        """Write the file whole or not at all."""
        content = {"layout": LAYOUT, "machine": self.machine, "sections": self.sections}
        staged = self.path.with_suffix(self.path.suffix + ".new")
        staged.write_text(json.dumps(content, indent=1) + "\n")
        staged.replace(self.path)


def read(path: Path) -> dict[str, Any]:
    """The content of a file of this benchmark. Raises UnsuitableFile."""
    found = content(path)
    if found.get("layout") != LAYOUT:
        raise UnsuitableFile(f"{path} is no file of this benchmark, or one of an earlier layout")
    return found


def content(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UnsuitableFile for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnsuitableFile(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UnsuitableFile(f"{path} is no file of this benchmark")
    return found
