"""The end of a run: the failed items of its parts are gathered, and `_SUCCESS` is written with the totals.

    parts ─▶ _run/failed/NNNNN.jsonl ─▶ _run/failures.jsonl ─▶ _SUCCESS

Everything is derived from parts in object storage. So any worker or client may do each step, also twice and at the same time.
Errors are those of the store, and RunError for a file that pipefleet did not write.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipefleet.contract.layout import RunLayout, RunPlan, index_of
from pipefleet.contract.messages import encode_json
from pipefleet.errors import ObjectMissingError
from pipefleet.foreign import name, readable, whole
from pipefleet.runs.files import read_file
from pipefleet.runs.progress import RunProgress
from pipefleet.storage.store import ObjectStore


@dataclass(frozen=True, slots=True)
class Resumed:
    """The content of resumed.json: the refused shards that were ever taken up, and the word that a valid `_SUCCESS` holds."""

    word: str = ""
    shards: tuple[int, ...] = ()


def read_totals(store: ObjectStore, layout: RunLayout) -> RunProgress | None:
    """The totals of an ended run, from `_SUCCESS`; None before the end, and after shards were taken up again.

    Raises RunError for a file that pipefleet did not write.
    """
    try:
        totals = read_file(store, layout.success)
    except ObjectMissingError:
        return None
    with readable(layout.success):
        ended = RunProgress.from_json(layout.uri, totals)
    return ended if totals.get("resumed", "") == read_resumed(store, layout).word else None


def read_resumed(store: ObjectStore, layout: RunLayout) -> Resumed:
    """The content of resumed.json. Raises RunError for a file that pipefleet did not write."""
    try:
        body = read_file(store, layout.resumed)
    except ObjectMissingError:
        return Resumed()
    with readable(layout.resumed):
        return Resumed(name(body["word"]), tuple(whole(index) for index in body["shards"]))


def finalise(
    store: ObjectStore,
    layout: RunLayout,
    plan: RunPlan,
    *,
    refused: int = 0,
    reason: str | None = None,
    resumed: Resumed | None = None,
    now: float,
) -> RunProgress | None:
    """Gather the failed items and write `_SUCCESS`. The caller has seen every part. Safe to call twice and at the same time.

    `refused` counts the parts of shards that no worker ran, `reason` is the reason of one of them (see `runs.refusals`). `resumed`
    is the answer of `read_resumed` from before the caller looked at the parts; if it has changed since, the run has not ended and
    None is returned. `now` is in seconds since 1970 by the Redis server's clock, as `RunPlan.created` is.
    """
    resumed = resumed or Resumed()
    failed, items = _gather_failures(store, layout), plan.items or 0
    totals = RunProgress(
        uri=layout.uri,
        state=_state(items, failed),
        items=items,
        succeeded=items - failed,
        failed=failed,
        shards=plan.shards or 0,
        parts=plan.shards or 0,
        seconds=round(max(0.0, now - plan.created), 3),
        refused=refused,
        refused_reason=reason,
    )
    body = {field: value for field, value in totals.to_json().items() if field != "uri"}
    body |= {"resumed": resumed.word} if resumed.word else {}
    for _ in range(2):
        store.put_new(layout.success, encode_json(body).encode())
        ended = read_totals(store, layout)
        if ended is not None or read_resumed(store, layout).word != resumed.word:
            return ended
        store.delete(layout.success)  # a slow client ended the run although it was resumed meanwhile
    return None


def _state(items: int, failed: int) -> str:
    if failed == 0:
        return "succeeded"
    return "failed" if failed >= items else "partial"


def write_failed_rows(store: ObjectStore, layout: RunLayout, index: int, rows: list[dict[str, Any]]) -> None:
    """Write the failed rows of a part as manifest lines. They follow from the part alone, so a second write is harmless."""
    lines = [encode_json(_manifest_row(row)) for row in rows if "error" in row]
    if lines:
        body = ("\n".join(lines) + "\n").encode()
        store.put(layout.failed_shard(index), body, content_type="application/x-ndjson")


def failed_lines(store: ObjectStore, layout: RunLayout) -> Iterator[bytes]:
    """The failed items that are listed so far, as manifest lines, shard by shard."""
    for entry in store.list(layout.failed):
        index = index_of(entry.key)
        if index is not None:
            yield from store.lines(layout.failed_shard(index))


def _manifest_row(row: dict[str, Any]) -> dict[str, Any]:
    parameters = {"parameters": row["parameters"]} if row.get("parameters") else {}
    return {"id": row["id"], "inputs": row["input"], **parameters, "error": row["error"]}


def _gather_failures(store: ObjectStore, layout: RunLayout) -> int:
    """Join the failed items of all shards into one file. Returns their number."""
    count = 0
    with tempfile.TemporaryFile() as gathered:
        for line in failed_lines(store, layout):
            gathered.write(line + b"\n")
            count += 1
        if count:
            gathered.seek(0)
            store.upload(layout.failures, gathered, content_type="application/x-ndjson")
    return count
