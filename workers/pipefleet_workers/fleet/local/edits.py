"""Edits of the fleet file under a running `pipefleet up`: each settled edit is returned once, and a mistake raises an error.

fleet.toml ─▶ FleetEdits.news ─▶ Description ─▶ a copy under data/run/ that the workers of this version read

`command` makes it, and `Follower` asks it for news. Clients have `pipefleet.fleet.latest` instead, which passes mistakes over.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipefleet.errors import FleetFileError, UsageError
from pipefleet.fleet.file import fingerprint, load_fleet
from pipefleet.fleet.pools import Fleet, Pool, WorkerRange
from pipefleet.fleet.routing import queue_name, revision_queue

LOOK_SECONDS = 1.0
_PLACES = ("model", "tokenizer", "processor", "offload_folder")
"""Keys of a pool that may be paths relative to the file."""


@dataclass(frozen=True, slots=True)
class Duty:
    """The settings that the workers of one pool depend on: while they stay equal, no worker needs to be replaced."""

    pool: Pool
    queue: str

    @property
    def queues(self) -> frozenset[str]:
        """Every queue that workers with this duty consume."""
        return frozenset({self.queue, revision_queue(self.queue, self.pool.model, self.pool.revision)})


@dataclass(frozen=True, slots=True)
class Description:
    """One version of a fleet file. `tables` are its pools as written, with absolute paths."""

    fleet: Fleet
    tables: Mapping[str, Mapping[str, Any]]

    def duty(self, name: str) -> Duty:
        """The duty of the workers of one key of `Fleet.revisions`."""
        pool = self.fleet.pool(name)
        # A worker does not depend on its siblings, on this host or others, nor on where jobs without a model go.
        essence = replace(
            pool, workers=WorkerRange(), devices=None, workers_per_device=1, wait_slo=0.0, default=False, previous=(),
            generation=0,
        )  # fmt: skip
        return Duty(essence, queue_name(pool, self.fleet))

    def table(self, name: str) -> Mapping[str, Any]:
        """The pool of one key of `Fleet.revisions`, as written."""
        return self.tables[self.fleet.pool(name).name]

    def to_toml(self) -> str:
        """The fleet file, in a form that can be read from any folder."""
        tables = (f"[pools.{name}]\n{_lines(table)}" for name, table in self.tables.items())
        return "# Written by `pipefleet up` for its workers.\n" + "\n".join(tables)


class FleetEdits:
    """A fleet file that may be edited at any time. One thread at a time may call it.

    With `allow_unpinned`, hub models without a revision are accepted. `clock` gives monotonic seconds.
    """

    def __init__(
        self, path: Path, *, allow_unpinned: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = path.absolute()
        self._allow_unpinned = allow_unpinned
        self._clock = clock
        self._seen: tuple[int, ...] | None = None
        self._judged: tuple[int, ...] | None = None
        self._look_at = clock()

    def read(self) -> Description:
        """The fleet that the file describes now. Raises FleetFileError, or UsageError for a missing model folder."""
        self._judged = self._seen = fingerprint(self.path)
        return self._parse()

    def news(self, *, at_once: bool = False) -> Description | None:
        """The content, if the file was written since the last reading; else None. Raises the errors of `read`.

        A changed file is read once two looks, LOOK_SECONDS apart, find it equal: an editor may be in the middle of writing it. With
        `at_once` it is read now, changed or not.
        """
        if not at_once and not self._settled():
            return None
        before, description, wrong = self._content(), None, None
        try:
            description = self.read()
        except UsageError as error:
            wrong = error
        if self._content() != before:  # it was written while it was read; the next looks will find a difference
            self._judged = None
            return None
        if wrong is not None:
            raise wrong
        return description

    def _settled(self) -> bool:
        """Whether the file differs from the judged version, and two looks in a row found it equal."""
        if self._clock() < self._look_at:
            return False
        self._look_at = self._clock() + LOOK_SECONDS
        before, self._seen = self._seen, fingerprint(self.path)
        return self._seen == before and self._seen != self._judged

    def _content(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError:
            return b""

    def _parse(self) -> Description:
        from pipefleet_workers.models.load import require_folder

        fleet = load_fleet(self.path, allow_unpinned=self._allow_unpinned)
        for pool in fleet.pools.values():
            require_folder(pool)
        try:
            written = tomllib.loads(self.path.read_text(encoding="utf-8"))["pools"]
        except (OSError, ValueError, LookupError) as error:
            raise FleetFileError(f"cannot read the fleet file {self.path}: {error}") from None
        return Description(fleet, {name: _absolute(table, fleet.pools[name]) for name, table in written.items()})


def _absolute(table: Mapping[str, Any], pool: Pool) -> dict[str, Any]:
    found = {key: getattr(pool, key) if key in _PLACES else value for key, value in table.items()}
    if "previous" in table:
        before = [table["previous"]] if isinstance(table["previous"], Mapping) else table["previous"]
        found["previous"] = [_absolute(one, retired) for one, retired in zip(before, pool.previous, strict=True)]
    return found


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{_text(key)} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    """A value of TOML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(key)} = {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return _text(value) if isinstance(value, str) else str(value).lower()


def _text(text: str) -> str:
    """A basic string of TOML: as in JSON, but TOML takes no surrogates and no bare DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
