"""Checks of Redis: that it answers, takes writes and drops no jobs, and what its user may do there."""

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
    """Version and latency of Redis. Raises PipefleetError where it does not answer, takes no writes or may drop jobs."""
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
    """Raises PipefleetError where `information`, the answer to INFO, is of a server that refuses writes, with what to do."""
    if information.get("role") == "slave":
        raise PipefleetError(f"Redis {sentence_of(READ_ONLY)}")
    if "err" in (information.get("aof_last_write_status"), information.get("rdb_last_bgsave_status")):
        raise PipefleetError(f"Redis {sentence_of(UNSAVED)}")


def check_rights(settings: Settings) -> str:
    """The rights in Redis of the user of these settings, in one sentence."""
    with redis_errors(settings.redis_url):
        return rights.describe(connect(settings))
