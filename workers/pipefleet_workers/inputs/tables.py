"""Tables: columns of texts, as JSON or as a CSV or JSON file, become a pandas table whose cells are all texts.

`Decoder` calls `decode_table`. A value or a file that is no table raises ItemError.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pipefleet.inputs.delimited import allow_long_cells, delimiter_of
from pipefleet.inputs.tables import columns_of, distinct, texts_of
from pipefleet_workers.items import Blob, ItemError

if TYPE_CHECKING:
    import pandas

STAGE = "decode"


def decode_table(value: Any, *, max_bytes: int) -> pandas.DataFrame:
    """The table. Raises ItemError: bad_input if it is no table, bad_media for a file without a table, too_large."""
    import pandas

    columns = _from_file(value, max_bytes) if isinstance(value, Blob) else columns_of(value)
    if columns is None:
        raise ItemError("bad_input", "a table is a dict of columns of one length, not empty", STAGE)
    return pandas.DataFrame(columns, dtype=str)


def _from_file(blob: Blob, max_bytes: int) -> dict[str, list[str]]:
    if len(blob.content) > max_bytes:
        raise ItemError("too_large", f"{blob.uri} is longer than {max_bytes} bytes", STAGE)
    try:
        text = blob.content.decode(_encoding(blob.content))
        columns = _from_json(text) if text.lstrip()[:1] in ("{", "[") else _from_csv(text)
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ItemError("bad_media", f"{blob.uri} is neither a CSV nor a JSON table: {error}", STAGE) from None
    if not columns or not any(columns.values()):
        raise ItemError("bad_media", f"{blob.uri} holds an empty table", STAGE)
    return columns


def _encoding(content: bytes) -> str:
    """UTF-8, or the UTF-16 of Excel's "Unicode text", recognised by its byte order mark."""
    return "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _from_json(text: str) -> dict[str, list[str]]:
    """The same forms as an inline table; also other forms that pandas reads as a table, such as a list of lists."""
    import pandas

    found = json.loads(text)
    columns = columns_of(found)
    if columns is not None or not found:
        return columns or {}
    table = pandas.DataFrame(found, dtype=object)
    return {str(name): texts_of(table[name].tolist()) for name in table.columns}


def _from_csv(text: str) -> dict[str, list[str]]:
    """Columns by the names in the first line. A shorter row ends with empty cells. Raises ValueError for a longer row."""
    allow_long_cells()
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter_of(text.partition("\n")[0]))
    names = distinct(next((row for row in reader if row), []))
    columns: list[list[str]] = [[] for _ in names]
    for row in filter(None, reader):
        if any(row[len(names) :]):
            raise ValueError(f"line {reader.line_num} has more cells than the table has columns")
        for column, cell in zip_longest(columns, row[: len(names)], fillvalue=""):
            column.append(cell)  # type: ignore[union-attr]  # there are as many columns as names
    return dict(zip(names, columns, strict=True))
