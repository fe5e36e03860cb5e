"""The doctor's check of this machine's clock against the clocks of Redis and of the store.

`report` calls it. It returns a sentence with both differences; a large difference is a warning with the remedy.
It raises PipefleetError if Redis is away, or if the difference to the store is so large that S3 may refuse requests.
"""

from __future__ import annotations

import time
from contextlib import suppress

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import server_time
from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings
from pipefleet.storage.s3_errors import clock_sentence
from pipefleet.storage.store import ObjectStore

WARN_SECONDS = 5.0
"""A larger difference is a warning with the remedy. The store tells its time only to the second."""
MOST_SECONDS = 300.0
"""A larger difference to the store's clock is a failure: S3 refuses requests that are 15 minutes off."""


def check_clocks(settings: Settings) -> str:
    """The difference to the clock of Redis and to the clock of the store, in one sentence.

    Raises PipefleetError if Redis is away, or if the store's clock differs by more than MOST_SECONDS.
    """
    with redis_errors(settings.redis_url):
        redis = connect(settings)
        began = time.time()
        now = server_time(redis)
        behind_redis = now - (began + time.time()) / 2
    told = [_told(behind_redis, "Redis's")]
    behind_store: float | None = None
    with suppress(PipefleetError):  # a store that does not answer has a check of its own
        behind_store = ObjectStore().clock_behind(settings.store)
    if behind_store is not None:
        told.append(_told(behind_store, "the store's"))
    text = "; ".join(told)
    if behind_store is not None and abs(behind_store) > MOST_SECONDS:
        raise PipefleetError(f"{text}; S3 refuses requests of machines that are 15 minutes off")
    return text


def _told(behind: float, whose: str) -> str:
    if abs(behind) <= WARN_SECONDS:
        return f"{abs(behind):.1f} s {'behind' if behind > 0 else 'ahead of'} {whose}"
    return f"WARNING: {clock_sentence(behind, whose)}"
