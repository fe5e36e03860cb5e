"""The live workers of a pool that can write parts in a format, counted from their announcements in Redis.

`Client.map` asks before it plans, a worker before it hands a shard back. RunError says that no worker can; other errors are
redis-py's.
"""

from __future__ import annotations

from typing import Any

from pipefleet.connection.errors import redis_errors
from pipefleet.contract.parts import INSTALL
from pipefleet.errors import RunError
from pipefleet.fleet.announcements import announced_workers


def writers(redis: Any, pool: str, format: str, *, but: str = "") -> tuple[int, int]:
    """The number of live workers of `pool`, and of those that can write parts in `format`; without the worker `but`.

    A worker that does not announce its formats, of an earlier release, counts as able. Raises redis-py's errors.
    """
    live = [one for name, one in announced_workers(redis).items() if one["pool"] == pool and name != but]
    return len(live), sum(format in one.get("formats", [format]) for one in live)


def require_writer(redis: Any, url: str, pool: str, format: str) -> None:
    """Raise RunError if the pool has live workers and none of them can write parts in `format`."""
    with redis_errors(url):
        live, able = writers(redis, pool, format)
    if live and not able:
        raise RunError(
            f"none of the {live} workers of the pool {pool} can write parts in the format {format}: {INSTALL} where "
            "they run, or leave the format out"
        )
