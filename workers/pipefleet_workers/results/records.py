"""The results of single jobs, in the form that their records have. Long results become objects, several stored at once.

`Reporter` passes jobs and outcomes to `RecordWriter.write`, and gets a `Said` for each. An absent store is such a `Said` as well:
nothing is raised.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from pipefleet.contract.messages import JobMessage, encode_json
from pipefleet.contract.records import JobFailure
from pipefleet.contract.references import StorageRef, join_uri
from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings
from pipefleet_workers.adapters.base import brief
from pipefleet_workers.items import Outcome
from pipefleet_workers.results.lines import body_of
from pipefleet_workers.storage.store import WorkerStore

log = logging.getLogger(__name__)
STORED_AT_ONCE = 8
"""Most results that are stored at the same time."""
Said = dict[str, Any] | JobFailure | Exception
"""One of three: the fields of a record with the result; the failure of the job; the error of an absent service.

After such an error the job has not ended.
"""


class RecordWriter:
    """Writes the results of single jobs. Thread-safe. Raises nothing: an error with one result ends only its own job."""

    def __init__(self, store: WorkerStore, settings: Settings) -> None:
        self._store = store
        self._settings = settings

    def write(self, ends: Sequence[tuple[JobMessage, Outcome]], *, every: bool = False) -> list[Said]:
        """The `Said` of each job. Results outside the record are stored side by side, since each takes a round trip.

        With `every`, all results are stored as objects.
        """
        found: list[Said] = [_inline(body_of(outcome)) for _, outcome in ends]
        long = [place for place, (message, _) in enumerate(ends) if self._is_stored(message, found[place], every)]
        found_at = _side_by_side(lambda place: self._stored(ends[place][0], found[place]), long)
        return [found_at.get(place, said) for place, said in enumerate(found)]

    def _is_stored(self, message: JobMessage, said: Said, every: bool) -> bool:
        if not isinstance(said, dict):
            return False
        return every or message.output is not None or len(said["output"]) > self._settings.inline_bytes

    def _stored(self, message: JobMessage, said: Any) -> Said:
        """Store a result. An absent service leaves the job without an end; any other error is the job's failure."""
        try:
            uri, size = self._put(message, said["output"])
            return {"output_ref": encode_json(StorageRef(uri, size=size, type="application/json").to_json())}
        except PipefleetError as error:
            return error if error.retryable else JobFailure(error.code, str(error), "write")
        except BaseException as error:  # a Rust panic is not an Exception
            log.exception("the result of job %s cannot be stored", message.id)
            return JobFailure("internal_error", brief(error), "write")

    def _put(self, message: JobMessage, body: bytes) -> tuple[str, int | None]:
        """The URI of the result, and its size unless another worker was first. The job names the object, so it is written once."""
        uri = message.output
        if uri is not None and not uri.endswith("/"):
            self._store.put(uri, body, content_type="application/json")
            return uri, len(body)
        folder = (self._settings.store, "results") if uri is None else (uri,)
        own = join_uri(*folder, f"{message.id}.json")
        ours = self._store.put_new(own, body, content_type="application/json")
        return own, len(body) if ours else None


def _side_by_side(do: Callable[[int], Said], places: Sequence[int]) -> dict[int, Said]:
    """The results of `do`, which raises nothing, for each place. Threads are daemons: a worker that must end waits for none."""
    found: dict[int, Said] = {}
    waiting: SimpleQueue[int] = SimpleQueue()
    for place in places:
        waiting.put(place)

    def work() -> None:
        with suppress(Empty):
            while True:
                place = waiting.get_nowait()
                found[place] = do(place)

    # No services: they end by themselves, and this call waits for them.
    threads = [threading.Thread(target=work, daemon=True) for _ in places[:STORED_AT_ONCE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _inline(body: bytes | JobFailure) -> Said:
    return body if isinstance(body, JobFailure) else {"output": body}
