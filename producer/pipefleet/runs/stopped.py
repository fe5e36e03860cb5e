"""Why the planning of a run ended before its source: noted under the run, so that every client can say it.

A client that is killed notes nothing; its run is known as stopped because its planner gives no sign of life any more.
"""

from __future__ import annotations

from contextlib import suppress

from pipefleet.contract.layout import RunLayout
from pipefleet.contract.messages import encode_json
from pipefleet.errors import ObjectMissingError, PipefleetError, RunError
from pipefleet.runs.files import read_file
from pipefleet.storage.store import ObjectStore

UNKNOWN = "the client that planned it ended before its source did"
"""What is said of a planner that left no reason."""


def note_stopped(store: ObjectStore, layout: RunLayout, error: PipefleetError, *, at: float) -> None:
    """Keep the error that ended the planning, `at` seconds since 1970 by the Redis server's clock.

    Does nothing while the store is away: the error itself says so.
    """
    body = {"code": error.code, "message": str(error), "at": at}
    with suppress(PipefleetError):
        store.put(layout.stopped, encode_json(body).encode())


def read_stopped(store: ObjectStore, layout: RunLayout) -> str | None:
    """The sentence of the error that ended the planning; None where none is noted."""
    try:
        return str(read_file(store, layout.stopped)["message"])
    except ObjectMissingError:
        return None
    except (RunError, LookupError):
        return UNKNOWN


def forget_stopped(store: ObjectStore, layout: RunLayout) -> None:
    """Somebody goes on with the planning."""
    store.delete(layout.stopped)
