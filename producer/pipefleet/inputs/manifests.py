"""The rows of a manifest, one by one, with bounded memory.

A manifest is JSON lines (`.jsonl`, `.ndjson`), a JSON array (`.json`), a table (`.csv`, `.tsv`) or one text a line (`.txt`), each
also with `.gz`. Chunks of bytes come in, rows with their line numbers go out. `sources` calls `rows`. ManifestError names the
line; a row that is not text becomes `Unreadable` and fails alone.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipefleet.errors import ManifestError, PipefleetError, nearest
from pipefleet.inputs.delimited import (
    LONGEST_LINE,
    allow_long_cells,
    delimiter_of,
    lines_of,
    text_of,
    unreadable_at,
    unzipped,
    with_line_feeds,
)
from pipefleet.tasks import TaskSpec

KEYS = {"inputs", "id", "parameters"}
ANNOTATIONS = {"error", "input", "output", "provenance", "warnings"}
"""Keys that a failures file has beside those of a manifest. They are passed over when the file is read as a manifest."""
FORMATS = "a .jsonl, .ndjson, .json, .csv, .tsv or .txt manifest (also with .gz)"
"""The kinds of manifests, for messages."""
_SUFFIXES = ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
_FIRST_PIECE = 1 << 16
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that is not text. It fails alone."""

    reason: str


Row = Mapping[str, Any] | Unreadable


def suffix_of(name: str) -> str | None:
    """The suffix of a manifest's name, in lower case, without `.gz`; None for a name of no manifest."""
    suffix = name.lower().removesuffix(".gz").rpartition("/")[2].rpartition(".")[2]
    return suffix if suffix in _SUFFIXES and "." in name else None


def rows(chunks: Iterable[bytes], where: str, spec: TaskSpec) -> Iterator[tuple[int, Row]]:
    """Line number and row of each item of the manifest at `where`. Raises ManifestError for a line that cannot be used."""
    if where.lower().endswith(".gz"):
        chunks = unzipped(chunks)
    suffix, texts = suffix_of(where), with_line_feeds(text_of(chunks))
    line = 0
    try:
        for line, row in _READERS[suffix or ""](texts, where, spec):
            yield line, row
    except PipefleetError:  # an error of S3 too, which is about no line
        raise
    except ValueError as error:
        raise ManifestError(f"{where}, behind line {line}: {error}") from None


def _json_lines(texts: Iterator[str], where: str, spec: TaskSpec) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(texts):
        if (column := unreadable_at(line)) is not None:
            yield number, Unreadable(_place(number, column, "not UTF-8"))
            continue
        row = _loaded(line, where, number)
        if not isinstance(row, dict):
            raise ManifestError(f"{where}, {_place(number, 1, 'a JSON object is expected')}")
        yield number, _unannotated(row)


def _text_lines(texts: Iterator[str], where: str, spec: TaskSpec) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(texts):
        column = unreadable_at(line)
        yield (
            number,
            {"inputs": line.rstrip("\r\n")} if column is None else Unreadable(_place(number, column, "not UTF-8")),
        )


def _lines(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The lines that hold more than spaces, with their numbers."""
    return ((number, line) for number, line in enumerate(lines_of(texts), start=1) if line.strip())


def _loaded(line: str, where: str, number: int) -> Any:
    try:
        return _DECODER.decode(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{where}, {_place(number, error.colno, error.msg)}") from None
    except RecursionError:
        raise ManifestError(f"{where}, {_place(number, 1, 'nested too deeply')}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ManifestError(f"{where}, {_place(number, 1, str(error))}") from None


def _json_file(texts: Iterator[str], where: str, spec: TaskSpec) -> Iterator[tuple[int, Row]]:
    """A JSON array of inputs or of rows; or JSON lines in a `.json` file, as many programs write them."""
    head = next((text for text in texts if text.strip()), "")
    texts = itertools.chain([head], texts)
    if head.lstrip().startswith("["):
        yield from ((number, _row_of(value, number)) for number, value in Array(texts, where).values())
        return
    try:
        yield from _json_lines(texts, where, spec)
    except ManifestError as error:
        raise ManifestError(f"{error}; a .json manifest is one JSON array, or one JSON object a line") from None


def _row_of(value: Any, line: int) -> Row:
    """The row of an array's element: the element itself if it has the key `inputs`; else the element is the inputs."""
    if not _is_text(value):
        return Unreadable(f"the element that begins in line {line}: not UTF-8")
    if not isinstance(value, Mapping) or "inputs" not in value:
        return {"inputs": value}
    return _unannotated(value)


def _unannotated(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row if ANNOTATIONS.isdisjoint(row) else {key: one for key, one in row.items() if key not in ANNOTATIONS}


def _is_text(value: Any) -> bool:
    """Whether all texts in a JSON value are free of bytes that `text_of` could not read."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except RecursionError:  # preparing the item will say so
        return True
    return True


class Array:
    """The values of a JSON array that comes in pieces. It holds one value at a time, of at most LONGEST_LINE characters."""

    def __init__(self, texts: Iterator[str], where: str) -> None:
        self._texts = texts
        self._where = where
        self._text = ""
        self._place = 0
        self._line = 1

    def values(self) -> Iterator[tuple[int, Any]]:
        """Each value, with the line where it begins. Raises ManifestError."""
        self._take("[")
        if self._next() == "]":
            self._take("]")
        else:
            yield self._value()
            while self._take(",]") == ",":
                yield self._value()
        if self._next():
            raise self._error("something follows the array")

    def _take(self, characters: str) -> str:
        found = self._next()
        if not found or found not in characters:
            raise self._error(
                f"{' or '.join(map(repr, characters))} is expected" if found else "the array is not closed"
            )
        self._place += 1
        return found

    def _next(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            while self._place < len(self._text):
                character = self._text[self._place]
                if character not in " \t\r\n":
                    return character
                self._line += character == "\n"
                self._place += 1
            if not self._more(_FIRST_PIECE):
                return ""

    def _value(self) -> tuple[int, Any]:
        if not self._next():
            raise self._error("the array is not closed")
        line = self._line
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                cut = end + 3 > len(
                    self._text
                )  # a number may go on in the next piece: "12" of "12e+3", "12." of "12.5"
                length = end - self._place
                if not cut or not self._more(_FIRST_PIECE):
                    self._line += self._text.count("\n", self._place, self._place + length)
                    self._place += length
                    return line, value
            except json.JSONDecodeError as error:
                held = len(self._text) - self._place  # read as much again, so that a long value is not parsed too often
                if held > LONGEST_LINE and error.msg.startswith("Unterminated"):
                    raise self._error(f"a text has more than {LONGEST_LINE} characters") from None
                if held > LONGEST_LINE or not self._more(max(held, _FIRST_PIECE)):
                    raise self._error(error.msg, error.pos) from None
            except RecursionError:
                raise self._error("nested too deeply") from None

    def _more(self, size: int) -> bool:
        """Read at least `size` more characters, and drop the finished ones. False at the end."""
        pieces, found = [self._text[self._place :]], 0
        while found < size and (piece := next(self._texts, None)) is not None:
            pieces.append(piece)
            found += len(piece)
        self._text, self._place = "".join(pieces), 0
        return found > 0

    def _error(self, text: str, at: int | None = None) -> ManifestError:
        line = self._line + (0 if at is None else self._text.count("\n", self._place, at))
        return ManifestError(f"{self._where}, line {line}: {text}")


def _csv_table(texts: Iterator[str], where: str, spec: TaskSpec) -> Iterator[tuple[int, Row]]:
    return _table(texts, where, spec, None)


def _tsv_table(texts: Iterator[str], where: str, spec: TaskSpec) -> Iterator[tuple[int, Row]]:
    return _table(texts, where, spec, "\t")


def _table(texts: Iterator[str], where: str, spec: TaskSpec, delimiter: str | None) -> Iterator[tuple[int, Row]]:
    """Line number and row of each record. csv gets lines with their ends, because quoted fields may hold line ends."""
    allow_long_cells()
    lines = lines_of(texts)
    header = next(lines, "")
    marked = _Marked(itertools.chain([header], lines))
    reader = csv.reader(marked, delimiter=delimiter or delimiter_of(header), strict=True)
    try:
        columns = next(reader, [])
        if marked.unreadable:
            raise ManifestError(f"{where}, {marked.unreadable}")
        _check_columns(columns, where, spec)
        for record in reader:
            if unreadable := marked.taken():
                yield reader.line_num, Unreadable(unreadable)
            elif record and len(record) != len(columns):
                raise ManifestError(f"{where}, {_place(reader.line_num, len(columns), 'wrong number of columns')}")
            elif record:
                yield reader.line_num, _csv_row(dict(zip(columns, record, strict=True)))
    except csv.Error as error:
        raise ManifestError(f"{where}, {_place(reader.line_num, 1, str(error))}") from None


class _Marked:
    """Lines for csv. `unreadable` names the place in the current record that is not text."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = enumerate(lines, start=1)
        self.unreadable: str | None = None

    def __iter__(self) -> Iterator[str]:
        for number, line in self._lines:
            column = unreadable_at(line)
            if column is not None and self.unreadable is None:
                self.unreadable = _place(number, column, "not UTF-8")
            yield line.replace("\0", "\ufffd")

    def taken(self) -> str | None:
        found, self.unreadable = self.unreadable, None
        return found


def _check_columns(columns: list[str], where: str, spec: TaskSpec) -> None:
    known = {"id", "inputs", *spec.fields}
    for column in columns:
        if column not in known:
            raise ManifestError(f"{where}, line 1, column 1: unknown column {column!r}{nearest(column, known)}")
        if columns.count(column) > 1:
            raise ManifestError(f"{where}, line 1, column 1: the column {column!r} is there twice")
    fields = set(columns) - {"id"}
    if not fields:
        raise ManifestError(f"{where}, line 1, column 1: a column `inputs` is missing")
    if "inputs" in fields and len(fields) > 1:
        others = ", ".join(sorted(fields - {"inputs"}))
        raise ManifestError(f"{where}, line 1, column 1: either a column `inputs` or its fields ({others}), not both")


def _csv_row(row: Mapping[str, str]) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if name not in ("id", "inputs")}
    identity = {"id": row["id"]} if row.get("id") else {}  # an empty cell is no id
    return {"inputs": row.get("inputs", fields), **identity}


def _place(line: int, column: int, text: str) -> str:
    return f"line {line}, column {column}: {text}"


_READERS = {
    "jsonl": _json_lines, "ndjson": _json_lines, "json": _json_file,
    "csv": _csv_table, "tsv": _tsv_table, "txt": _text_lines,
}  # fmt: skip
