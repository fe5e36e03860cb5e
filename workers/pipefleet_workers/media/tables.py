"""Tables: columns of texts, as JSON or as a CSV or JSON file, to a pandas table whose cells are all texts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipefleet_workers.items import Blob, ItemError

if TYPE_CHECKING:
    import pandas

STAGE = "decode"


def decode_table(value: Any, *, max_bytes: int) -> pandas.DataFrame:
    """The table. Raises ItemError: bad_input for what is no table, bad_media for a file that holds none, too_large."""
    import pandas

    if isinstance(value, Blob):
        return _from_file(value, max_bytes)
    if not _is_columns(value):
        raise ItemError("bad_input", "a table is a dict of columns of one length, not empty", STAGE)
    return pandas.DataFrame({str(name): [str(cell) for cell in cells] for name, cells in value.items()}, dtype=str)


def _from_file(blob: Blob, max_bytes: int) -> pandas.DataFrame:
    import pandas

    if len(blob.content) > max_bytes:
        raise ItemError("too_large", f"{blob.uri} is longer than {max_bytes} bytes", STAGE)
    try:
        text = blob.content.decode("utf-8-sig")
        if text.lstrip()[:1] in ("{", "["):
            found = json.loads(text)
            table = pandas.DataFrame(found)
        else:
            table = pandas.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    except (ValueError, TypeError, RecursionError, pandas.errors.ParserError) as error:
        raise ItemError("bad_media", f"{blob.uri} is neither a CSV nor a JSON table: {error}", STAGE) from None
    if table.empty:
        raise ItemError("bad_media", f"{blob.uri} holds an empty table", STAGE)
    return table.astype(str)


def _is_columns(value: Any) -> bool:
    columns = isinstance(value, Mapping) and bool(value) and all(isinstance(one, list) for one in value.values())
    return columns and len({len(cells) for cells in value.values()}) == 1 and all(value.values())
