"""Checks of `pipefleet doctor` that are not about one service: workers that are refused, and the clocks of this machine."""

from __future__ import annotations

import time
from contextlib import suppress

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.connection.reading import server_time
from pipefleet.errors import PipefleetError
from pipefleet.fleet.announcements import announced_workers, refused_places
from pipefleet.printable import printable
from pipefleet.settings import Settings
from pipefleet.storage.s3_errors import clock_sentence
from pipefleet.storage.store import ObjectStore

WARN_SECONDS = 5.0
"""A clock that is further off is told with what to do about it. The store's is known to the second only."""
MOST_SECONDS = 300.0
"""A clock that is further off than this from the store's is a failure: S3 refuses requests of 15 minutes off."""


def access_of_workers(settings: Settings) -> str:
    """Raises PipefleetError that names the workers which take no jobs since S3 refuses them, and why."""
    with redis_errors(settings.redis_url):
        workers = announced_workers(connect(settings))
    barred = {name: str(facts["barred"]) for name, facts in sorted(workers.items()) if facts.get("barred")}
    told = [f"{printable(name)} takes no jobs: {printable(why, 400)}" for name, why in barred.items()]
    for name, facts in sorted(workers.items()):
        if places := refused_places(facts):
            buckets = printable(", ".join(f"s3://{one}/" for one in places), 400)
            told.append(
                f"{printable(name)} gives jobs back whose bucket S3 refuses to it: {buckets}; see what its policy allows"
            )
    if told:
        raise PipefleetError("; ".join(told))
    return f"S3 refuses none of {len(workers)}"


def clocks(settings: Settings) -> str:
    """How far this machine's clock is from those of Redis and of the store. Raises PipefleetError where S3 may refuse it."""
    with redis_errors(settings.redis_url):
        redis = connect(settings)
        began = time.time()
        now = server_time(redis)
        behind_redis = now - (began + time.time()) / 2
    told = [_told(behind_redis, "Redis's")]
    behind_store: float | None = None
    with suppress(PipefleetError):  # a store that does not answer is told by its own check
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
