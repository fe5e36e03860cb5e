"""Tables, inline or in a JSON file, become columns of texts. Producer and workers share these rules, so both read a table alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

_MISSING = ("NAType", "NaTType")
"""Types of pandas' marks of a missing value."""


def columns_of(value: Any) -> dict[str, list[str]] | None:
    """The columns of a dict of columns or of a list of rows, all cells as texts; None for another value or an empty table.

    A missing cell (null, NaN, a row without this key) becomes an empty text, which models read as an empty cell.
    """
    if isinstance(value, list | tuple) and value and all(isinstance(row, Mapping) for row in value):
        names = dict.fromkeys(name for row in value for name in row)
        value = {name: [row.get(name) for row in value] for name in names}
    if not isinstance(value, Mapping) or not all(isinstance(cells, list | tuple) for cells in value.values()):
        return None
    if {len(cells) for cells in value.values()} == {0} or len({len(cells) for cells in value.values()}) != 1:
        return None
    return {str(name): texts_of(cells) for name, cells in value.items()}


def texts_of(cells: Iterable[Any]) -> list[str]:
    """Cells as texts."""
    return ["" if _is_missing(cell) else str(cell) for cell in cells]


def distinct(names: list[str]) -> list[str]:
    """Names of columns; a number makes a repeated name distinct."""
    found: list[str] = []
    for name in names:
        number, one = 0, name
        while one in found:
            number += 1
            one = f"{name}.{number}"
        found.append(one)
    return found


def _is_missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ in _MISSING or (isinstance(cell, Real) and cell != cell)
