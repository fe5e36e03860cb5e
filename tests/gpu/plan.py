"""The types of a plan: `Check` is one line of the table, `Order` the arguments of a run, `Result` the end of a check.

The modules `check_*` and `bench_*` make checks, `children` runs each in a process of its own, `report` prints the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Skip(Exception):
    """A check cannot run here; its sentence says why. The run as a whole does not fail."""


@dataclass(frozen=True)
class Order:
    """What a check is told. `folder` is its own, to write in; `quick` asks for a few items only."""

    device: str
    quick: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        """False in a rehearsal."""
        return self.device != "cpu"

    def note(self, name: str, **figures: Any) -> None:
        """Keep a row of figures; rows that were noted before a check fails or hangs are reported as well."""
        with (self.folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps({"row": name, **figures}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The rows that were noted so far."""
        file = self.folder / "rows.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(frozen=True)
class Check:
    """One line of the table. `run` returns a sentence on what it has shown; it raises Skip, or any error to fail."""

    name: str
    part: str
    run: Callable[[Order], str]
    seconds: float
    """After this time its process is killed, and the check has failed."""
    quick: bool = False
    """Whether `--quick` runs it too."""
    alone: bool = False
    """Whether no other check may use the device meanwhile."""


@dataclass(frozen=True)
class Result:
    """The end of a check. `said` is its sentence, `rows` its figures."""

    name: str
    part: str
    state: str
    said: str
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The fields, as `results.json` has them."""
        return asdict(self)
