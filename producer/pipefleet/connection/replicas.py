"""Whether a Redis that answers is a replica: its figures may be old, and it takes no writes. `queues` and `doctor` ask."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipefleet.connection import answers
from pipefleet.settings import without_credentials

if TYPE_CHECKING:
    from redis import Redis


def old_figures(redis: Redis, url: str) -> str | None:
    """One sentence if the server is a replica; None for a primary, and without the right to ask. Raises redis-py's other errors."""
    from redis.exceptions import ResponseError

    with suppress(ResponseError):
        found: Any = redis.info("replication")
        if found.get("role") == "slave":
            place = without_credentials(url)
            return f"what is told may be old: Redis at {place} {answers.sentence_of(answers.READ_ONLY)}"
    return None
