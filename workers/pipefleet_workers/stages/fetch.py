"""fetch: references become bytes. Bounded by the worker's budget of bytes; every object size-checked and pinned by ETag."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pipefleet.errors import PipefleetError
from pipefleet.storage import StorageRef, map_refs
from pipefleet_workers.items import Blob, Fetched, ItemError, Work
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.settings import WorkerSettings

STAGE = "fetch"


class Fetcher:
    """Fetches the objects of items. Thread-safe."""

    def __init__(self, store: WorkerStore, settings: WorkerSettings) -> None:
        self._store = store
        self._limit = settings.max_object_bytes
        self._allowed = tuple(prefix.strip() for prefix in settings.allowed_uris.split(",") if prefix.strip())

    def fetch(self, work: Work) -> Fetched:
        """`work` with the bytes of its objects. Raises ItemError with a code that says what is wrong with the object."""
        begin = time.perf_counter()
        inputs = map_refs(work.item.inputs, self._blob)
        work.seconds[STAGE] = time.perf_counter() - begin
        return Fetched(work, inputs)

    def _blob(self, reference: StorageRef) -> Blob:
        if not reference.uri.startswith(self._allowed):
            raise ItemError("forbidden", f"{reference.uri} lies outside what this worker may read", STAGE)
        self._check_size(reference.uri, reference.size)
        try:
            content = self._store.get(reference)
        except PipefleetError as error:
            raise ItemError(error.code, str(error), STAGE) from None
        self._check_size(reference.uri, len(content))
        if reference.size is not None and len(content) != reference.size:
            raise ItemError(
                "truncated_media", f"{reference.uri} has {len(content)} bytes instead of {reference.size}", STAGE
            )
        return Blob(reference.uri, content, reference.type)

    def _check_size(self, uri: str, size: int | None) -> None:
        if size == 0:
            raise ItemError("empty_object", f"{uri} is empty", STAGE)
        if size is not None and size > self._limit:
            raise ItemError("too_large", f"{uri} has {size} bytes, above the bound of {self._limit}", STAGE)


def slices(works: Sequence[Work], size: int) -> list[Sequence[Work]]:
    """`works` in slices of at most `size`."""
    return [works[start : start + size] for start in range(0, len(works), size)]
