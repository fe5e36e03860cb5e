"""A worker's first contact with Redis: it refuses a server that can never serve, and waits, within a bound, for writes to work.

The start of a worker calls it. Raises UsageError for a Redis Cluster, ServiceUnavailableError when the wait is over.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

from pipefleet.connection import answers
from pipefleet.connection.connect import connect
from pipefleet.connection.errors import redis_errors
from pipefleet.errors import PipefleetError, ServiceUnavailableError, UsageError
from pipefleet.patience import Patience
from pipefleet.queues.keys import WORKERS_KEY
from pipefleet.settings import Settings, without_credentials
from pipefleet_workers.settings import WorkerSettings

log = logging.getLogger(__name__)
LONGEST_PAUSE = 2.0


def connect_patiently(settings: Settings, worker_settings: WorkerSettings) -> Any:
    """A client of a Redis that takes writes. Waits while Redis loads, is a replica, or does not answer.

    Raises ServiceUnavailableError after `start_patience` seconds, UsageError for a node of a Redis Cluster.
    """
    redis = connect(settings)
    patience = Patience(seconds=worker_settings.start_patience, longest=LONGEST_PAUSE, told=_Once())

    def look() -> None:
        with redis_errors(settings.redis_url):
            refuse_cluster(redis, settings)
            redis.hdel(WORKERS_KEY, "")

    patience.call(look)
    return redis


def refuse_unusable(settings: Settings) -> None:
    """Raise UsageError for a server that will never serve. A server that is away raises nothing here."""
    with contextlib.suppress(ServiceUnavailableError), redis_errors(settings.redis_url):
        refuse_cluster(connect(settings), settings)


def refuse_cluster(redis: Any, settings: Settings) -> None:
    """Raise UsageError for a node of a Redis Cluster. Raises redis-py's errors; a missing right to ask refuses nothing."""
    from redis.exceptions import NoPermissionError

    try:
        information = redis.info("cluster")
    except NoPermissionError:
        return
    if int(information.get("cluster_enabled", 0)):
        raise UsageError(f"Redis at {without_credentials(settings.redis_url)} {answers.CLUSTER}")


class _Once:
    """Logs each kind of trouble once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, error: PipefleetError) -> None:
        if str(error) not in self._said:
            self._said.add(str(error))
            log.warning("waiting for a service: %s", error)
