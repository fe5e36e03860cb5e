"""Which live workers of a pool can write the parts of a run, by what they announce."""

from __future__ import annotations

from typing import Any

from pipefleet.connection.errors import redis_errors
from pipefleet.contract.parts import INSTALL
from pipefleet.errors import RunError
from pipefleet.fleet.announcements import announced_workers


def writers(redis: Any, pool: str, format: str, *, but: str = "") -> tuple[int, int]:
    """How many live workers of `pool` there are, and how many of them can write parts in `format`, without the worker `but`.

    A worker that does not tell, as those of earlier releases, counts as one that can. Raises what redis-py raises.
    """
    live = [one for name, one in announced_workers(redis).items() if one["pool"] == pool and name != but]
    return len(live), sum(format in one.get("formats", [format]) for one in live)


def require_writer(redis: Any, url: str, pool: str, format: str) -> None:
    """Raise RunError where workers of the pool are alive and none of them can write parts in `format`."""
    with redis_errors(url):
        live, able = writers(redis, pool, format)
    if live and not able:
        raise RunError(
            f"none of the {live} workers of the pool {pool} can write parts in the format {format}: {INSTALL} where "
            "they run, or leave the format out"
        )
