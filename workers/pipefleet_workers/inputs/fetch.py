"""Fetching: references become bytes. Every object's size is checked, and its ETag pinned; the worker's budget bounds the bytes.

The engine's fetch threads call `Fetcher.fetch`. A fault of the object fails its item; an outage of the store fails no item.
"""

from __future__ import annotations

import time

from pipefleet.contract.references import StorageRef, map_refs
from pipefleet.contract.uris import shown
from pipefleet.errors import PipefleetError, ServiceUnavailableError
from pipefleet_workers.items import Blob, Fetched, ItemError, Work, spend
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from pipefleet_workers.storage.uri_gate import UriGate, allowed_prefixes

STAGE = "fetch"


class Fetcher:
    """Fetches the objects of items. Thread-safe."""

    def __init__(self, store: WorkerStore, settings: WorkerSettings) -> None:
        self._store = store
        self._limit = settings.max_object_bytes
        self._gate = UriGate(allowed_prefixes(settings))

    def fetch(self, work: Work) -> Fetched:
        """`work` with the bytes of its objects.

        Raises ItemError with a code for a fault of the object. Raises ServiceUnavailableError when the object store stays away: the
        item is not at fault then, and its job should go back to the queue.
        """
        begin = time.perf_counter()
        inputs = map_refs(work.item.inputs, self._blob)
        spend([work], STAGE, time.perf_counter() - begin)
        return Fetched(work, inputs)

    def _blob(self, reference: StorageRef) -> Blob:
        if reference.size is not None and reference.size > self._limit:
            text = f"{shown(reference.uri)} has {reference.size} bytes, above the bound of {self._limit}"
            raise ItemError("too_large", text, STAGE)
        try:
            self._gate.require_reading(reference.uri)
            content = self._store.get(reference, max_bytes=self._limit)
        except ServiceUnavailableError:
            raise
        except PipefleetError as error:
            raise ItemError(error.code, str(error), STAGE) from None
        if not content:
            raise ItemError("empty_object", f"{shown(reference.uri)} is empty", STAGE)
        return Blob(reference.uri, content, reference.type)
