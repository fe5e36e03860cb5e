"""What must become of a message, as far as the checks that are functions tell: the same ones that the worker calls."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

from kombu.transport.virtual import Channel as VirtualChannel
from kombu.transport.virtual import Message

from pipefleet.contract.messages import TASK_NAME, JobMessage, decode_message
from pipefleet.errors import ContractError
from pipefleet_workers.delivery.envelope import MalformedError, check_message, read_envelope

CHANNEL: Any = VirtualChannel.__new__(VirtualChannel)


class Fate(StrEnum):
    """What becomes of a message."""

    LETTER = "letter"
    """It must become a dead letter."""
    JOB = "job"
    """It is a single job: its record reaches a final state, or it becomes a dead letter."""
    SHARD = "shard"


def opened(raw: bytes) -> Any:
    """The message that a consumer is given. Raises MalformedError, and nothing else whatever `raw` is."""
    envelope = read_envelope(raw)
    try:
        message = Message(envelope, channel=CHANNEL)
    except Exception:  # noqa: BLE001 - as the transport, which opens messages so
        raise MalformedError("its body is not what its encoding says") from None
    check_message(message)
    return message


def job_in(raw: bytes) -> JobMessage:
    """The job of a message. Raises MalformedError or ContractError."""
    message = opened(raw)
    if message.headers.get("task") != TASK_NAME or message.content_type != "application/json":
        raise MalformedError("it is of another task or type")
    payload = message.payload
    if not isinstance(payload, list) or not payload or not isinstance(payload[0], list) or len(payload[0]) != 1:
        raise MalformedError("its body is no call of our task")
    return decode_message(payload[0][0])


def fate(raw: bytes) -> tuple[Fate, str | None]:
    """What must become of a message, and the id of its job."""
    try:
        job = job_in(raw)
    except (MalformedError, ContractError):
        return Fate.LETTER, None
    return (Fate.JOB if job.shard is None else Fate.SHARD), job.id


def has_eta(record: bytes) -> bool:
    """Whether a message in the ledger asks to be run later."""
    try:
        headers = json.loads(record)[0]["headers"]
        return bool(headers["eta"])
    except (ValueError, LookupError, TypeError):
        return False
