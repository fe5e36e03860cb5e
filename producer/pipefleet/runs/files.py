"""Reading the files of a run. Other programs may write to the bucket too, so types and bounds are checked.

Every reader of plans, totals and parts calls these functions. RunError names a file that pipefleet did not write.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipefleet.foreign import mapping, read_json, readable
from pipefleet.printable import printable

if TYPE_CHECKING:
    from pipefleet.storage.store import ObjectStore

log = logging.getLogger("pipefleet")
MOST_BYTES = 64 << 20
"""Most bytes of JSON in a file of a run."""


def read_file(store: ObjectStore, uri: str) -> Mapping[str, Any]:
    """The JSON object in a file of a run. Raises ObjectMissingError, or RunError, which names the file."""
    body = store.get(uri, max_bytes=MOST_BYTES)
    with readable(uri):
        return mapping(read_json(body, most=MOST_BYTES))


def rows_of(lines: Iterable[bytes], where: str) -> Iterator[dict[str, Any]]:
    """The rows of a part, each with an id. Raises RunError, which names `where`, for a line that is not a row."""
    for line in lines:
        with readable(where):
            row = json.loads(line)
            row["id"]
        yield row


def failed_rows(lines: Iterable[bytes], where: str) -> Iterator[dict[str, Any]]:
    """The failed items of a run, each with id and error. Another line is passed over with a warning."""
    for line in lines:
        try:
            row = dict(mapping(json.loads(line)))
            row["id"], [row["error"][name] for name in ("code", "message", "stage")]
        except (ValueError, LookupError, TypeError, RecursionError):
            log.warning("a line of %s is no failed item of a run and is passed over", printable(where, 300))
            continue
        yield row
