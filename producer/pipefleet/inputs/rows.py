"""A row of a source becomes a `SourceItem`. Sources call these functions; the planner takes the items.

A row that cannot be prepared becomes an item with a `failure`, so that it fails alone. An outage, or a refusal of the credentials,
is raised: it says nothing about the item.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipefleet.contract.messages import encode_json
from pipefleet.contract.references import refs_in
from pipefleet.errors import ContractError, InputError, ParameterError, PipefleetError
from pipefleet.inputs.prepare import InputPreparer
from pipefleet.tasks import Media
from pipefleet.tasks.parameters import called_parameters

LARGEST_ITEM = 64 << 20
"""Most bytes of JSON of an item in a shard: references, texts, id and parameters."""
LARGEST_SHOWN = 1 << 20
"""Most bytes of JSON of an input in the row of a failed item. A larger input is left out."""
_LONGEST_REASON = 400
_WRITTEN = (Media.TEXT, Media.TEXTS, Media.PROMPT)
"""Media of which a text is the input itself and names no file."""


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One item without a number yet: `inputs` as JSON with references, and `size`, its bytes that count in a shard."""

    id: str | None
    inputs: Any
    size: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    """Why the item could not be prepared, as a sentence; None for an item that a worker can run."""
    written: str | None = field(default=None, compare=False)
    """The JSON of `inputs`, so that it is made once; None if nobody has made it."""


def row_item(row: Mapping[str, Any], preparer: InputPreparer) -> SourceItem:
    """The item of one row. Without an id, the key of its only reference is the id; else None stands for its position.

    Raises UsageError for inputs, parameters or an id that a shard cannot hold.
    """
    given = row.get("parameters")
    parameters = called_parameters(preparer.spec, given) if given else {}
    prepared = preparer.prepare(row["inputs"], parameters)
    references = [] if isinstance(prepared, str) else refs_in(prepared)
    identity = row.get("id")
    if identity is None and isinstance(prepared, Mapping) and len(references) == 1:
        identity = references[0].key
    written = encode_json(prepared)
    size = _bytes(written) + _bytes(encode_json(identity)) + (_bytes(encode_json(parameters)) if parameters else 2) + 4
    if size > LARGEST_ITEM:
        raise InputError(
            f"the item has {size} bytes of JSON, a shard takes {LARGEST_ITEM}; put it into an object of its own"
        )
    size = max(size, sum(one.size or 0 for one in references))
    return SourceItem(None if identity is None else str(identity), prepared, size, parameters, written=written)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def item_or_failure(row: Mapping[str, Any], preparer: InputPreparer) -> SourceItem:
    """The item of one row; with a `failure` if its inputs, parameters or id cannot be used.

    Raises errors that say nothing about this item: ServiceUnavailableError, AccessDeniedError, ObjectMissingError.
    """
    try:
        return row_item(row, preparer)
    except (InputError, ParameterError, ContractError) as error:
        return failed_item(row, str(error), media=preparer.spec.media)
    except PipefleetError:
        raise
    except Exception as error:  # noqa: BLE001 - a picture or an array of the user's own may raise anything
        reason = f"the input cannot be read: {type(error).__name__}: {error}"
        return failed_item(row, reason, media=preparer.spec.media)


def in_utf8(name: str) -> str:
    r"""A name, with bytes that are not UTF-8 written as `\xe9`: rows are JSON, which has no form for such bytes."""
    try:
        return os.fsencode(name).decode(errors="backslashreplace")
    except UnicodeEncodeError:
        return name.encode(errors="backslashreplace").decode()


def failed_item(row: Mapping[str, Any], reason: str, *, media: Media | None = None) -> SourceItem:
    """The failed item of a row that cannot be used: its inputs, id and parameters, as far as they are JSON.

    `media` is that of the task: where it is written, a path is left out, since whoever gives the row to a run again would get an
    answer about the text of the path.
    """
    inputs, identity, parameters = (_shown(row, name, media) for name in ("inputs", "id", "parameters"))
    return SourceItem(
        None if identity is None else str(identity),
        inputs,
        len(encode_json(inputs)),
        parameters if isinstance(parameters, Mapping) else {},
        reason[:_LONGEST_REASON].encode(errors="replace").decode(),
    )


def _shown(row: Mapping[str, Any], name: str, media: Media | None) -> Any:
    """A value of a row if it is JSON that a row can hold, a path as its text; else None."""
    try:
        value = row.get(name)
        if name == "inputs" and media in _WRITTEN and isinstance(value, os.PathLike):
            return None
        shown = os.fspath(value) if isinstance(value, os.PathLike) else value
        shown = in_utf8(shown) if name == "id" and isinstance(shown, str) else shown
        refs_in(shown)
        return shown if len(encode_json(shown)) <= LARGEST_SHOWN else None
    except Exception:  # noqa: BLE001 - a row that decodes itself when it is read may raise anything, here once more
        return None
