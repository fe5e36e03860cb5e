"""The doctor's check of a Redis that answers and takes no writes."""

from __future__ import annotations

from collections.abc import Mapping

from pipefleet.connection.answers import READ_ONLY, UNSAVED, sentence_of
from pipefleet.errors import PipefleetError


def judge_writes(information: Mapping[str, object]) -> None:
    """Raises PipefleetError with the remedy if `information`, the answer to INFO, is of a server that refuses writes."""
    if information.get("role") == "slave":
        raise PipefleetError(f"Redis {sentence_of(READ_ONLY)}")
    if "err" in (information.get("aof_last_write_status"), information.get("rdb_last_bgsave_status")):
        raise PipefleetError(f"Redis {sentence_of(UNSAVED)}")
