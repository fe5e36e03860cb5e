"""The doctor's checks of Redis: it answers, takes writes and drops no jobs; and the rights of its user.

`report` calls `check_redis` and `check_rights`; each returns a sentence. Each raises PipefleetError if Redis is away;
`check_redis` also does so for a replica, a server that cannot save, and a policy that may drop jobs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pipefleet.connection import rights
from pipefleet.connection.answers import READ_ONLY, UNSAVED, sentence_of
from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError
from pipefleet.settings import Settings, without_credentials


def check_redis(settings: Settings) -> str:
    """Version and latency of Redis. Raises PipefleetError if Redis does not answer, takes no writes or may drop jobs."""
    redis = connect(settings)
    with redis_errors(settings.redis_url):
        begin = time.perf_counter()
        redis.ping()
        milliseconds = (time.perf_counter() - begin) * 1000
        information = _information(redis)
    if information is None:
        return f"{without_credentials(settings.redis_url)}, {milliseconds:.1f} ms; its user may not run INFO, so no more is known"
    version = information.get("valkey_version") or information.get("redis_version")
    judge_writes(information)
    policy = information.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise PipefleetError(f"maxmemory-policy is {policy}: Redis may drop jobs; set it to noeviction")
    return f"{without_credentials(settings.redis_url)}, version {version}, {milliseconds:.1f} ms"


def _information(redis: Any) -> Any:
    from redis.exceptions import NoPermissionError

    try:
        return redis.info()
    except NoPermissionError:
        return None


def judge_writes(information: Mapping[str, object]) -> None:
    """Raise PipefleetError with the remedy if `information`, the answer to INFO, shows that the server refuses writes."""
    if information.get("role") == "slave":
        raise PipefleetError(f"Redis {sentence_of(READ_ONLY)}")
    if "err" in (information.get("aof_last_write_status"), information.get("rdb_last_bgsave_status")):
        raise PipefleetError(f"Redis {sentence_of(UNSAVED)}")


def check_rights(settings: Settings) -> str:
    """One sentence on the rights that the user of these settings has in Redis."""
    with redis_errors(settings.redis_url):
        return rights.describe(connect(settings))
