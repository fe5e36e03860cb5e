"""Where the items of a bulk run come from: a bucket prefix, a manifest, a folder, or any iterable.

Every source yields `SourceItem`s one by one, in a fixed order, with constant memory. A manifest is read through once before
anything is written, so a malformed line refuses the run instead of ending it half way.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipefleet.contract import encode_json
from pipefleet.errors import InputError, ManifestError, PipefleetError, SourceError, nearest
from pipefleet.inputs import InputPreparer
from pipefleet.objects import ObjectStore
from pipefleet.storage import StorageRef, is_uri, refs_in, split_uri
from pipefleet.tasks import TaskSpec

MANIFEST_KEYS = {"inputs", "id", "parameters"}
_ANNOTATIONS = {"error", "input", "output", "provenance"}
"""Keys that a failures file has beside those of a manifest, and that are passed over when it is read as one."""


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One item before it is numbered: `inputs` as JSON with references; `size` in bytes, what it weighs in a shard."""

    id: str | None
    inputs: Any
    size: int
    parameters: Mapping[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """A source of items. `describe` is what the run remembers of it; None when it cannot be read a second time."""

    def describe(self) -> str | None:
        """The URI or path, for `run.json`."""

    def check(self) -> None:
        """Raise SourceError when the source is missing or malformed; reads it through where that is needed."""

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """The items after the first `skip`, the last of which was `last`."""


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """Every object under an `s3://` prefix, in the order of the keys, but nothing under `exclude`."""

    uri: str
    store: ObjectStore
    exclude: str

    def describe(self) -> str:
        """The prefix."""
        return self.uri

    def check(self) -> None:
        """Raise SourceError unless the bucket exists and holds something under the prefix."""
        self.store.require_bucket(self.uri)
        if next(self.items(0, None), None) is None:
            raise SourceError(f"nothing lies under {self.uri}; check the prefix (it is case-sensitive)")

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """Objects after `last`; keys ending in a slash are folder marks and are passed over."""
        bucket, _ = split_uri(self.uri)
        excluded_bucket, excluded = split_uri(self.exclude)
        after = refs_in(last.inputs)[0].key if last else ""
        for entry in self.store.list(self.uri, after=after):
            inside_output = bucket == excluded_bucket and entry.key.startswith(excluded)
            if entry.key.endswith("/") or inside_output:
                continue
            guess = StorageRef.of(f"s3://{bucket}/{entry.key}")
            pinned = StorageRef(guess.uri, entry.etag, entry.size, guess.type)
            yield SourceItem(entry.key, pinned.to_json(), entry.size)


@dataclass(frozen=True, slots=True)
class ManifestSource:
    """The lines of a `.jsonl` or `.csv` manifest, in object storage or in a local file."""

    location: str
    store: ObjectStore
    spec: TaskSpec
    preparer: InputPreparer

    def describe(self) -> str:
        """The manifest's URI, or its absolute path."""
        return self.location if is_uri(self.location) else str(Path(self.location).resolve())

    def check(self) -> None:
        """Read it through. Raise ManifestError for the first line that does not parse."""
        count = 0
        for line, row in self._rows():
            _check_row(line, row, self.spec, self.location)
            count += 1
        if not count:
            raise SourceError(f"the manifest {self.location} is empty")

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """Items after the first `skip` rows."""
        for line, row in itertools.islice(self._rows(), skip, None):
            try:
                yield row_item(row, self.preparer)
            except InputError as error:
                raise ManifestError(f"{self.location}, line {line}: {error}") from None

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        lines = self._lines()
        return _csv_rows(lines, self.location, self.spec) if self._is_csv else _json_rows(lines, self.location)

    @property
    def _is_csv(self) -> bool:
        return self.location.lower().endswith(".csv")

    def _lines(self) -> Iterator[bytes]:
        if is_uri(self.location):
            yield from self.store.lines(self.location)
            return
        with open(self.location, "rb") as file:
            for line in file:
                yield line.rstrip(b"\r\n")


@dataclass(frozen=True, slots=True)
class IterableSource:
    """Any iterable of inputs, or of rows shaped like manifest lines. It is read once, lazily."""

    values: Iterable[Any]
    preparer: InputPreparer

    def describe(self) -> None:
        """Nothing: it cannot be opened again."""
        return

    def check(self) -> None:
        """Nothing to look at without consuming it."""

    def items(self, skip: int, last: SourceItem | None) -> Iterator[SourceItem]:
        """Items after the first `skip` values."""
        for value in itertools.islice(self.values, skip, None):
            row = value if _is_row(value) else {"inputs": value}
            yield row_item(row, self.preparer)


def open_source(source: Any, spec: TaskSpec, store: ObjectStore, preparer: InputPreparer, *, output: str) -> Source:
    """The Source for what a user named. Raises SourceError for a string that is neither a URI nor a local path."""
    if isinstance(source, str | Path):
        return _named_source(str(source), spec, store, preparer, output)
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise SourceError(f"a source is an s3:// URI or an iterable of inputs, not a {type(source).__name__}")
    return IterableSource(source, preparer)


def _named_source(name: str, spec: TaskSpec, store: ObjectStore, preparer: InputPreparer, output: str) -> Source:
    is_manifest = name.lower().endswith((".jsonl", ".csv"))
    if name.startswith("s3://"):
        split_uri(name)
        if is_manifest:
            return ManifestSource(name, store, spec, preparer)
        return PrefixSource(name, store, output)
    path = Path(name)
    if path.is_dir():
        return IterableSource((one for one in sorted(path.rglob("*")) if one.is_file()), preparer)
    if path.is_file() and is_manifest:
        return ManifestSource(name, store, spec, preparer)
    raise SourceError(f"no such source {name[:200]!r}: give an s3:// prefix, a .jsonl or .csv manifest, or a folder")


def row_item(row: Mapping[str, Any], preparer: InputPreparer) -> SourceItem:
    """The item of one manifest row. Without an id, the key of its one reference serves, else its position (None)."""
    prepared = preparer.prepare(row["inputs"])
    references = refs_in(prepared)
    identity = row.get("id")
    if identity is None and isinstance(prepared, Mapping) and len(references) == 1:
        identity = references[0].key
    size = sum(one.size or 0 for one in references) or len(encode_json(prepared))
    return SourceItem(None if identity is None else str(identity), prepared, size, row.get("parameters") or {})


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and "inputs" in value and set(value) <= MANIFEST_KEYS


def _json_rows(lines: Iterator[bytes], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise ManifestError(f"{where}, line {number}, column {error.colno}: {error.msg}") from None
        except UnicodeDecodeError as error:
            raise ManifestError(f"{where}, line {number}, column {error.start + 1}: not UTF-8") from None
        if not isinstance(row, dict):
            raise ManifestError(f"{where}, line {number}, column 1: a JSON object is expected")
        yield number, {key: value for key, value in row.items() if key not in _ANNOTATIONS}


def _csv_rows(lines: Iterator[bytes], where: str, spec: TaskSpec) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        stream = io.TextIOWrapper(io.BufferedReader(_LineReader(lines)), encoding="utf-8-sig", newline="")
        reader = csv.DictReader(stream, strict=True)
        columns = reader.fieldnames or []
        _check_columns(columns, where, spec)
        for row in reader:
            if None in row or None in row.values():
                raise ManifestError(f"{where}, line {reader.line_num}, column {len(columns)}: wrong number of columns")
            yield reader.line_num, _csv_row(row)
    except csv.Error as error:
        raise ManifestError(f"{where}, line {reader.line_num}, column 1: {error}") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where}, line 1, column 1: not UTF-8 ({error.reason})") from None


def _check_columns(columns: Iterable[str], where: str, spec: TaskSpec) -> None:
    known = {"id", "inputs", *spec.fields}
    for column in columns:
        if column not in known:
            raise ManifestError(f"{where}, line 1, column 1: unknown column {column!r}{nearest(column, known)}")
    if not set(columns) - {"id"}:
        raise ManifestError(f"{where}, line 1, column 1: a column `inputs` is missing")


def _csv_row(row: Mapping[str, str]) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if name not in ("id", "inputs")}
    identity = {"id": row["id"]} if "id" in row else {}
    return {"inputs": row.get("inputs", fields), **identity}


def _check_row(line: int, row: Mapping[str, Any], spec: TaskSpec, where: str) -> None:
    unknown = set(row) - MANIFEST_KEYS
    if unknown:
        word = sorted(unknown)[0]
        raise ManifestError(f"{where}, line {line}, column 1: unknown key {word!r}{nearest(word, MANIFEST_KEYS)}")
    if "inputs" not in row:
        raise ManifestError(f"{where}, line {line}, column 1: the key 'inputs' is missing")
    if not isinstance(row.get("id", ""), str | int) or not isinstance(row.get("parameters", {}), Mapping):
        raise ManifestError(f"{where}, line {line}, column 1: id must be a text, parameters an object")
    try:
        spec.check(row.get("parameters", {}))
    except PipefleetError as error:
        raise ManifestError(f"{where}, line {line}, column 1: {error}") from None


class _LineReader(io.RawIOBase):
    """Lines as a readable byte stream, because csv must see line ends inside quoted fields."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            line = next(self._lines, None)
            if line is None:
                return 0
            self._rest = line + b"\n"
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)
