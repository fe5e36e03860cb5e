"""The doctor's checks of object storage: a written object reads back unchanged, and exactly one of several conditional writes wins.

`report` calls them. Both write and delete objects under the prefix of the store, and return a sentence.
They raise PipefleetError if the store is away, refuses access, or fails the check.
"""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor

from pipefleet.contract.references import join_uri
from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings
from pipefleet.storage.s3_errors import endpoint
from pipefleet.storage.store import ObjectStore

RACERS = 50
ROUNDS = 3


def check_store(settings: Settings) -> str:
    """Write, read back and delete an object; a sentence on it. Raises PipefleetError if a step fails."""
    store, uri = ObjectStore(), join_uri(settings.store, f"doctor-{uuid.uuid4().hex}")
    store.require_bucket(settings.store)
    store.put(uri, b"pipefleet")
    try:
        if store.get(uri) != b"pipefleet":
            raise PipefleetError(f"{uri} reads back differently than it was written")
    finally:
        store.delete(uri)
    return f"{settings.store} at {endpoint()} can be written and read"


def check_conditional_writes(settings: Settings) -> str:
    """Let RACERS writers write one key: exactly one may win, else a part of a run could be replaced.

    Returns a sentence. Raises PipefleetError if none or several win.
    """
    store = ObjectStore()
    with ThreadPoolExecutor(RACERS) as threads:
        for _ in range(ROUNDS):
            uri = join_uri(settings.store, f"doctor-{uuid.uuid4().hex}")
            won = list(threads.map(lambda racer, uri=uri: store.put_new(uri, str(racer).encode()), range(RACERS)))
            body = store.get(uri)
            store.delete(uri)
            if sum(won) != 1 or body != str(won.index(True)).encode():
                raise PipefleetError(
                    f"{sum(won)} of {RACERS} conditional writes of one key won: this server cannot promise that every "
                    "result appears once; upgrade it or use another"
                )
    return f"one of {RACERS} racing writers wins, {ROUNDS} times of {ROUNDS}"
