"""Checks of values that other programs may have written to Redis or to object storage.

Bytes or JSON values come in; values of the right type, within bounds, go out. Every reader of Redis and of a run's files calls
these functions. They raise ValueError for a wrong value; inside of `readable` that becomes RunError, which names the file.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipefleet.errors import PipefleetError, RunError
from pipefleet.printable import printable

log = logging.getLogger("pipefleet")
MOST_BYTES = 1 << 20
"""Bytes of JSON that one entry of Redis may have."""
MOST_NUMBER = 1e15
"""Largest number that readers accept: sums and products of such numbers stay finite."""
MOST_TEXT = 2_000
"""Characters of a name: of a pool, a model or a queue."""
QUEUE_PREFIX = "pipefleet."
"""How the name of every queue begins."""
_MOST_SAID = 1_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def read_json(raw: bytes | str | None, *, most: int = MOST_BYTES) -> Any:
    """The JSON of an entry. Raises ValueError for text that is not JSON (NaN and infinity are not), and above `most` bytes."""
    if raw is None or len(raw) > most:
        raise ValueError("missing, or too long")
    try:
        return json.loads(raw, parse_constant=_refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_object(raw: bytes | str | None, *, most: int = MOST_BYTES) -> Mapping[str, Any]:
    """The JSON object of an entry. Raises ValueError as `read_json` does, and for JSON that is not an object."""
    return mapping(read_json(raw, most=most))


def mapping(value: Any) -> Mapping[str, Any]:
    """`value`. Raises ValueError unless it is a JSON object."""
    if not isinstance(value, Mapping):
        raise ValueError("not an object")
    return value


def number(value: Any, *, least: float = 0.0, most: float = MOST_NUMBER) -> float:
    """A number between the bounds, or the text of one as Redis keeps it. Raises ValueError, for NaN too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | bytes):
        raise ValueError("not a number")
    try:
        found = float(value)
    except OverflowError:
        raise ValueError("out of bounds") from None
    if not least <= found <= most:
        raise ValueError("out of bounds")
    return found


def whole(value: Any, *, least: int = 0, most: int = int(MOST_NUMBER)) -> int:
    """A whole number between the bounds, or the text of one. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | str | bytes):
        raise ValueError("not a whole number")
    found = int(value)
    if not least <= found <= most:
        raise ValueError("out of bounds")
    return found


def name(value: Any) -> str:
    """`value`. Raises ValueError unless it is a text of 1 to MOST_TEXT characters, in UTF-8, without control characters."""
    if not isinstance(value, str) or not 0 < len(value) <= MOST_TEXT or _CONTROL.search(value):
        raise ValueError("not a name")
    value.encode()
    return value


def own_queue(value: Any) -> str:
    """`value`. Raises ValueError unless it names a queue of pipefleet: readers make Redis keys of it."""
    if not name(value).startswith(QUEUE_PREFIX):
        raise ValueError("not a queue")
    return str(value)


def names(content: Mapping[str, Any], *fields: str) -> dict[str, str | None]:
    """The given fields, without those that `content` lacks. Raises ValueError unless each is a name or null."""
    found = {field: content[field] for field in fields if field in content}
    return {field: None if value is None else name(value) for field, value in found.items()}


class Passed:
    """Warns of entries that readers pass over, once for each entry, by the logger `pipefleet`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: set[tuple[str, bytes]] = set()

    def say(self, key: str, field: bytes | str) -> None:
        """Warn that the entry `field` of the hash `key` cannot be read, unless this entry was warned of before."""
        entry = key, (field.encode(errors="replace") if isinstance(field, str) else field)[:200]
        with self._lock:
            if entry in self._said or len(self._said) >= _MOST_SAID:
                return
            self._said.add(entry)
        log.warning("%s", unreadable(key, field))


def unreadable(key: str, field: bytes | str) -> str:
    """One sentence about an entry of a hash that readers pass over, with the next step."""
    shown = printable(field.decode(errors="replace") if isinstance(field, bytes) else field)
    return (
        f"the entry {shown!r} of {printable(key, 200)} was not written by pipefleet and is passed over; "
        f"`pipefleet doctor` lists such entries, `redis-cli HDEL` removes one"
    )


passed = Passed()


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn the errors that a wrong file raises inside of the block into RunError, which names `where`."""
    try:
        yield
    except PipefleetError:
        raise  # some are a ValueError too
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise RunError(
            f"{where} was not written by this version of pipefleet; use the release that began the run, or remove it where "
            f"something else wrote it"
        ) from None
