"""Reading the results and the failed items of a run from object storage. `Run.results` and `Run.failures` call it.

Rows come in the order of the source, with one part in memory at a time. An outage of the store is waited for with the
patience of the caller, and the reading goes on behind the last row that was given.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pipefleet.contract.artifacts import resolve
from pipefleet.contract.parts import JsonLines, part_format
from pipefleet.runs.files import failed_rows, rows_of
from pipefleet.runs.finishing import failed_lines

if TYPE_CHECKING:
    from pipefleet.contract.layout import RunLayout
    from pipefleet.patience import Patience
    from pipefleet.storage.store import ObjectStore


def read_results(
    store: ObjectStore, layout: RunLayout, patience: Patience, wait_for_part: Callable[[int], bool]
) -> Iterator[dict[str, Any]]:
    """Every row, with the arrays that lie beside its part. `wait_for_part` is False behind the last part of the run."""
    index = 0
    while wait_for_part(index):
        for row in patience.each(functools.partial(_rows_from, store, layout, index)):
            yield {**row, "output": resolve(row["output"], store.get)} if "output" in row else row
        index += 1


def read_failures(store: ObjectStore, layout: RunLayout, patience: Patience) -> Iterator[dict[str, Any]]:
    """The failed items so far; a line that is none is passed over."""

    def lines(read: int) -> Iterator[bytes]:
        return itertools.islice(failed_lines(store, layout), read, None)

    return failed_rows(patience.each(lines), layout.failed)


def _rows_from(store: ObjectStore, layout: RunLayout, index: int, read: int) -> Iterator[dict[str, Any]]:
    """The rows of a part behind the first `read`: lines as they come, rows of another format from the whole part."""
    return itertools.islice(_rows(store, layout, layout.part(index)), read, None)


def _rows(store: ObjectStore, layout: RunLayout, uri: str) -> Iterator[dict[str, Any]]:
    if layout.format == JsonLines.name:
        return rows_of(store.lines(uri), uri)
    return part_format(layout.format).rows(store.get(uri))
