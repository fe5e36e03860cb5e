"""The doctor's check of Redis's memory: how full it is, and whether a full Redis would drop keys.

`report` calls `check_memory`, which returns a sentence. It raises PipefleetError, with the remedy, if Redis will soon refuse
work, if its policy lets it drop keys, if it is a cluster, or if it is away.
"""

from __future__ import annotations

from typing import Any

from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings
from pipefleet_workers.delivery.redis_start import refuse_cluster

WARN_SHARE = 0.8
"""Above this share of `maxmemory` the server will soon refuse new work."""
KEEPS = "noeviction"


def check_memory(settings: Settings) -> str:
    """The used memory and its bound, in a sentence. Raises PipefleetError with the remedy if Redis will lose or refuse work."""
    from redis.exceptions import NoPermissionError

    redis = connect(settings)
    with redis_errors(settings.redis_url):
        try:
            refuse_cluster(redis, settings)
            found: Any = redis.info("memory")
        except NoPermissionError:
            return "not told: this user may not ask for it (INFO)"
    return judge(int(found["used_memory"]), int(found.get("maxmemory", 0)), str(found.get("maxmemory_policy", KEEPS)))


def judge(used: int, most: int, policy: str) -> str:
    """A sentence on `used` bytes of at most `most` (0: no bound). Raises PipefleetError if something must be done."""
    if policy.startswith("allkeys"):
        raise PipefleetError(f"maxmemory-policy is {policy}: a full Redis drops whole queues; set it to {KEEPS}")
    if policy != KEEPS:
        raise PipefleetError(
            f"maxmemory-policy is {policy}: a full Redis drops results and the progress of runs; set it to {KEEPS}"
        )
    if not most:
        return f"{_size(used)} used, no maxmemory"
    text = f"{_size(used)} of {_size(most)} used ({used / most:.0%})"
    if used >= most:
        raise PipefleetError(
            f"{text}: no new work is taken until workers have caught up; raise maxmemory, or start more"
        )
    if used >= WARN_SHARE * most:
        raise PipefleetError(f"{text}: soon no new work is taken; raise maxmemory, start more workers, or submit less")
    return text


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
