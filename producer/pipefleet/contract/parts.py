"""The formats of a run's parts: JSON lines, or Parquet with embeddings as vectors. No network.

A worker makes one line of JSON for each item; `encode` turns the lines of a shard into the bytes of a part. Clients turn a part
into rows again with `rows` and `failed`. RunError says that pyarrow is missing, ContractError that a format is unknown. A new
format is one class here and one entry of FORMATS.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

from pipefleet.errors import ContractError, RunError
from pipefleet.installed import is_installed

INSTALL = "pip install 'pipefleet[parquet]'"
MAX_PART_BYTES = 2 << 30
"""Most bytes of a part that is read whole. A worker holds all rows of a part in memory and writes it with a single PUT."""
FLOAT32 = 3.4028234e38
"""Largest number that a vector may hold."""
_ERROR = ("code", "message", "stage")
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class PartFormat(Protocol):
    """A format of parts. `name` is also the suffix of a part's object."""

    name: ClassVar[str]
    media_type: ClassVar[str]

    def require(self) -> None:
        """Raise RunError unless the library of the format is installed here."""

    vectors: ClassVar[bool]
    """Whether a part may hold outputs as vectors of float32."""

    def encode(self, lines: Sequence[bytes], vectors: Any = None) -> bytes:
        """The part that holds these rows, each a JSON object.

        With `vectors`, a float32 array `[rows, width]` of finite numbers, its row i is the output of line i. Only for formats
        that hold vectors.
        """

    def rows(self, part: bytes) -> Iterator[dict[str, Any]]:
        """The rows of a part, in order."""

    def failed(self, part: bytes) -> list[dict[str, Any]]:
        """The rows with an error, in order."""


class JsonLines:
    """One row for each line, as `datasets` and pandas read them."""

    name: ClassVar[str] = "jsonl"
    media_type: ClassVar[str] = "application/x-ndjson"
    vectors: ClassVar[bool] = False

    def require(self) -> None:
        """Nothing is needed."""

    def encode(self, lines: Sequence[bytes], vectors: Any = None) -> bytes:
        """The lines, each with its end."""
        return b"\n".join(lines) + b"\n"

    def rows(self, part: bytes) -> Iterator[dict[str, Any]]:
        """The rows of a part, in order."""
        return map(json.loads, part.splitlines())

    def failed(self, part: bytes) -> list[dict[str, Any]]:
        """The rows with an error. The other lines are not parsed."""
        return [json.loads(line) for line in part.splitlines() if b'"error":' in line]


class Parquet:
    """Columns id, input, parameters, output, error, provenance and warnings; error is a struct, warnings a list, the rest texts.

    `output` is a list of float32 of fixed size where every output of the part is a vector of that size within the range of
    float32, else JSON. `input` is the text or URI itself where every input of the part is a text, else JSON; the metadata of the
    column tells which.
    """

    name: ClassVar[str] = "parquet"
    media_type: ClassVar[str] = "application/vnd.apache.parquet"
    vectors: ClassVar[bool] = True

    def require(self) -> None:
        """Raise RunError unless pyarrow is installed."""
        if not is_installed("pyarrow"):
            raise RunError(f"parts in the format parquet need pyarrow: {INSTALL}, for the workers as well")

    def encode(self, lines: Sequence[bytes], vectors: Any = None) -> bytes:
        """The part; raises RunError where pyarrow is missing."""
        self.require()
        import pyarrow
        import pyarrow.parquet

        rows = [json.loads(line) for line in lines]
        error = pyarrow.struct([(name, pyarrow.string()) for name in _ERROR])
        columns = {
            "id": pyarrow.array([row["id"] for row in rows], pyarrow.string()),
            "input": _texts([row["input"] for row in rows]),
            "parameters": _json([row.get("parameters") for row in rows]),
            "output": _outputs(rows) if vectors is None else _columns(vectors),
            "error": pyarrow.array([row.get("error") for row in rows], error),
            "provenance": _json([row.get("provenance") for row in rows]),
            "warnings": pyarrow.array([row.get("warnings") for row in rows], pyarrow.list_(pyarrow.string())),
        }
        plain = all(isinstance(row["input"], str) for row in rows)
        fields = [pyarrow.field(name, column.type) for name, column in columns.items()]
        fields[1] = fields[1].with_metadata({"encoding": "text" if plain else "json"})
        buffer = io.BytesIO()
        table = pyarrow.Table.from_arrays(list(columns.values()), schema=pyarrow.schema(fields))
        pyarrow.parquet.write_table(table, buffer)
        return buffer.getvalue()

    def rows(self, part: bytes) -> Iterator[dict[str, Any]]:
        """The rows of a part, as JSON lines would give them. Raises RunError where pyarrow is missing."""
        return _rows(self._table(part))

    def failed(self, part: bytes) -> list[dict[str, Any]]:
        """The rows with an error, in order. The other rows are not made into objects."""
        table = self._table(part)
        return list(_rows(table.filter(table.column("error").is_valid())))

    def _table(self, part: bytes) -> Any:
        self.require()
        import pyarrow.parquet

        return pyarrow.parquet.read_table(io.BytesIO(part))


FORMATS: Mapping[str, PartFormat] = MappingProxyType({one.name: one for one in (JsonLines(), Parquet())})
"""Every format by its name."""


def part_format(name: str) -> PartFormat:
    """The format with this name. Raises ContractError for a name that this version does not know."""
    if name not in FORMATS:
        raise ContractError(f"parts in the format {name[:40]!r}: use a newer pipefleet")
    return FORMATS[name]


def writable_formats() -> list[str]:
    """The names of the formats that can be written here."""
    found = []
    for name, one in FORMATS.items():
        with contextlib.suppress(RunError):
            one.require()
            found.append(name)
    return found


def _json(values: list[Any]) -> Any:
    import pyarrow

    return pyarrow.array([None if one is None else _text(one) for one in values], pyarrow.string())


def _texts(values: list[Any]) -> Any:
    import pyarrow

    plain = all(isinstance(one, str) for one in values)
    return pyarrow.array(values if plain else [_text(one) for one in values], pyarrow.string())


def _outputs(rows: list[dict[str, Any]]) -> Any:
    """The column of outputs: vectors where all have one length, else JSON; nulls where every item failed."""
    import pyarrow

    outputs = [row.get("output") for row in rows]
    found = [row["output"] for row in rows if "output" in row]
    if not found:
        return pyarrow.nulls(len(rows))
    if all(_is_vector(one) for one in found) and len({len(one) for one in found}) == 1:
        return pyarrow.array(outputs, pyarrow.list_(pyarrow.float32(), len(found[0])))
    texts = [_text(row["output"]) if "output" in row else None for row in rows]
    return pyarrow.array(texts, pyarrow.string())


def _columns(vectors: Any) -> Any:
    """The column of outputs that all are vectors of one length."""
    import pyarrow

    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])


def _is_vector(value: Any) -> bool:
    """Whether a value is a list of numbers that float32 does not turn into infinity."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(one, float) and abs(one) <= FLOAT32 for one in value)
    )


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    plain = (table.schema.field("input").metadata or {}).get(b"encoding") == b"text"
    return (_row(row, plain=plain) for row in table.to_pylist())


def _row(row: dict[str, Any], *, plain: bool) -> dict[str, Any]:
    found = {"id": row["id"], "input": row["input"] if plain else json.loads(row["input"])}
    if row["parameters"] is not None:
        found["parameters"] = json.loads(row["parameters"])
    if row["error"] is not None:
        found["error"] = row["error"]
    else:
        found["output"] = json.loads(row["output"]) if isinstance(row["output"], str) else row["output"]
    if row.get("warnings"):  # a part of an earlier release has no such column
        found["warnings"] = row["warnings"]
    return {**found, "provenance": json.loads(row["provenance"])} if row["provenance"] is not None else found


def _text(value: Any) -> str:
    return _ENCODER.encode(value)
