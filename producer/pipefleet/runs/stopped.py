"""The reason why the planning of a run ended before its source, in `_run/stopped.json`, for every client to show.

`Run` and `start` write and remove the note; `Run.progress` reads it. A client that is killed notes nothing: its run counts as
stopped because its planner gives no sign of life any more.
"""

from __future__ import annotations

from contextlib import suppress

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import encode_json
from pipefleet.errors import ObjectMissingError, PipefleetError, RunError
from pipefleet.runs.files import read_file
from pipefleet.storage.store import ObjectStore

UNKNOWN = "the client that planned it ended before its source did"
"""The reason for a planner that left none."""


def note_stopped(store: ObjectStore, layout: RunLayout, error: PipefleetError, *, at: float) -> None:
    """Keep the error that ended the planning, `at` seconds since 1970 by the Redis server's clock.

    Does nothing while the store is away: the caller raises the error anyway.
    """
    body = {"code": error.code, "message": str(error), "at": at}
    with suppress(PipefleetError):
        store.put(layout.stopped, encode_json(body).encode())


def read_stopped(store: ObjectStore, layout: RunLayout) -> str | None:
    """The sentence of the error that ended the planning; None without a note."""
    try:
        return str(read_file(store, layout.stopped)["message"])
    except ObjectMissingError:
        return None
    except (RunError, LookupError):
        return UNKNOWN


def forget_stopped(store: ObjectStore, layout: RunLayout) -> None:
    """Remove the note: a client goes on with the planning."""
    store.delete(layout.stopped)
