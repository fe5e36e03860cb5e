"""From a row of a source to a `SourceItem`; a row that cannot be prepared becomes an item that has failed, not an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipefleet.contract.messages import encode_json
from pipefleet.contract.references import refs_in
from pipefleet.errors import ContractError, InputError, ParameterError, PipefleetError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.tasks.parameters import called_parameters

LARGEST_ITEM = 64 << 20
"""Bytes of JSON of an item that a shard takes: references, texts, id and parameters."""
LARGEST_SHOWN = 1 << 20
"""Bytes of JSON above which the input of a failed item is left out of its row."""
_LONGEST_REASON = 400


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One item before it is numbered: `inputs` as JSON with references; `size` in bytes, what it weighs in a shard."""

    id: str | None
    inputs: Any
    size: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    """Why it could not be prepared, as a sentence; None for an item that a worker can run."""


def row_item(row: Mapping[str, Any], preparer: InputPreparer) -> SourceItem:
    """The item of one manifest row. Without an id, the key of its one reference serves, else its position (None).

    Raises UsageError for inputs, parameters or an id that a shard cannot hold.
    """
    parameters = called_parameters(preparer.spec, row.get("parameters") or None)
    prepared = preparer.prepare(row["inputs"], parameters)
    references = refs_in(prepared)
    identity = row.get("id")
    if identity is None and isinstance(prepared, Mapping) and len(references) == 1:
        identity = references[0].key
    size = len(encode_json([prepared, identity, parameters]).encode())
    if size > LARGEST_ITEM:
        raise InputError(
            f"the item has {size} bytes of JSON, a shard takes {LARGEST_ITEM}; put it into an object of its own"
        )
    size = max(size, sum(one.size or 0 for one in references))
    return SourceItem(None if identity is None else str(identity), prepared, size, parameters)


def item_or_failure(row: Mapping[str, Any], preparer: InputPreparer) -> SourceItem:
    """The item of one row, or one with a `failure` when its inputs, parameters or id cannot be used.

    Raises what says nothing about this item: ServiceUnavailableError, AccessDeniedError, ObjectMissingError.
    """
    try:
        return row_item(row, preparer)
    except (InputError, ParameterError, ContractError) as error:
        return failed_item(row, str(error))
    except PipefleetError:
        raise
    except Exception as error:  # noqa: BLE001 - a picture or an array of the user's own may raise anything
        return failed_item(row, f"the input cannot be read: {type(error).__name__}: {error}")


def in_utf8(name: str) -> str:
    r"""A name as it is, or one whose bytes are not UTF-8 with those as `\xe9`: rows are JSON, which has no form for them."""
    try:
        return os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:
        return name.encode(errors="backslashreplace").decode()


def failed_item(row: Mapping[str, Any], reason: str) -> SourceItem:
    """The item of a row that cannot be used: its inputs, id and parameters as far as they are JSON."""
    inputs, identity, parameters = (_shown(row, name) for name in ("inputs", "id", "parameters"))
    return SourceItem(
        None if identity is None else str(identity),
        inputs,
        len(encode_json(inputs)),
        parameters if isinstance(parameters, Mapping) else {},
        reason[:_LONGEST_REASON].encode(errors="replace").decode(),
    )


def _shown(row: Mapping[str, Any], name: str) -> Any:
    """A value of a row where it is JSON that a row can hold, a path as its text; else None."""
    try:
        value = row.get(name)
        shown = os.fspath(value) if isinstance(value, os.PathLike) else value
        shown = in_utf8(shown) if name == "id" and isinstance(shown, str) else shown
        refs_in(shown)
        return shown if len(encode_json(shown)) <= LARGEST_SHOWN else None
    except Exception:  # noqa: BLE001 - a row that is decoded as it is read may raise anything, and once more here
        return None
