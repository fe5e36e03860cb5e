"""Checks messages, which any program may have written, before a consumer sees them and before anything is decoded.

`transport` passes the bytes of a fetched message and gets an envelope for kombu, or a MalformedError. Every producer may write to
the Redis lists, and many malformed messages end a worker of kombu and Celery. Kombu also unpacks compressed bodies without a bound:
no compressed body is accepted here, only JSON in UTF-8, as a text or as base64.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from kombu import compression

from pipefleet.contract.messages import MAX_WIRE_BYTES
from pipefleet_workers.delivery.headers import MalformedError, checked_headers, checked_properties

__all__ = ["MalformedError", "check_message", "mark", "read_envelope", "refuse_compression"]

DELIVERIES = "x-delivery-count"
RETRIES = "x-retry-count"
MOST_DEPTH = 100
"""Most levels of lists and objects in a body. Deeper nesting fills the stack, and no job's inputs need it."""
_ENCODINGS = ("base64", "utf-8")
_CHARACTERS = ("utf-8", "utf8", "us-ascii", "ascii")
_NO_JSON = (ValueError, RecursionError, TypeError, LookupError, ArithmeticError, AttributeError)


def read_envelope(raw: bytes, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """The message as a dictionary of the shape that kombu and Celery expect. Raises MalformedError.

    `clock` gives seconds since 1970, for the times in its headers.
    """
    if len(raw) > MAX_WIRE_BYTES:
        raise MalformedError(f"too_large: its message has {len(raw)} bytes, and a worker takes {MAX_WIRE_BYTES}")
    try:
        envelope = json.loads(raw)
    except _NO_JSON:
        raise MalformedError("it is not JSON") from None
    if not isinstance(envelope, dict):
        raise MalformedError("it is not a JSON object")
    properties = checked_properties(envelope.get("properties"))
    encoding = properties["body_encoding"]
    if encoding is not None and (not isinstance(encoding, str) or encoding.lower() not in _ENCODINGS):
        raise MalformedError("its body has an unknown encoding")
    if not isinstance(envelope.get("body"), str):
        raise MalformedError("its body is no text")
    return {
        "body": envelope["body"],
        "properties": properties,
        "headers": checked_headers(envelope.get("headers"), clock),
        **_checked_types(envelope.get("content-type"), envelope.get("content-encoding")),
    }


def mark(envelope: dict[str, Any], deliveries: int, retries: int) -> None:
    """Write two counts into the headers: deliveries of the message (with this one), and how often it was put back with a delay."""
    again = deliveries > 1
    envelope["headers"].update({DELIVERIES: deliveries, RETRIES: retries, "redelivered": again})
    envelope["properties"]["delivery_info"]["redelivered"] = again


def check_message(message: Any) -> None:
    """Check the decoded body. Raises MalformedError. The decoded body stays with the message, so it is not decoded twice."""
    if message.errors:
        raise MalformedError("its body has no UTF-8 form, or is compressed")
    _checked_types(message.content_type, message.content_encoding)
    if not isinstance(message.body, bytes | str) or len(message.body) > MAX_WIRE_BYTES:
        raise MalformedError(f"too_large: its body has more than {MAX_WIRE_BYTES} bytes")
    message.accept = {"application/json"}
    try:
        payload = json.loads(message.body)
    except _NO_JSON:
        raise MalformedError("its body is not JSON") from None
    if not payload or _too_deep(message.body, payload):
        raise MalformedError(f"its body is empty, or nests more than {MOST_DEPTH} deep")
    if "task" in (message.headers or {}) and not _is_call(payload):
        raise MalformedError("its body is not the arguments of a task")
    message._decoded_cache = payload  # kombu's own decoder would turn tagged objects into decimals and bytes


def refuse_compression() -> None:
    """Stop kombu from unpacking bodies in this process, for every caller: Celery's own transport and control channel unpack too."""
    for kind in compression.encoders():
        compression.register(compression.get_encoder(kind)[0], _refused, kind)


def _refused(body: Any) -> Any:
    raise MalformedError("its body is compressed")


def _checked_types(content_type: Any, content_encoding: Any) -> dict[str, Any]:
    if content_type != "application/json":
        raise MalformedError("its content-type is not application/json")
    known = isinstance(content_encoding, str) and content_encoding.lower() in _CHARACTERS
    if content_encoding is not None and not known:
        raise MalformedError("its content-encoding is not utf-8")
    return {"content-type": content_type, "content-encoding": content_encoding}


def _is_call(payload: Any) -> bool:
    if not isinstance(payload, list) or len(payload) != 3:
        return False
    args, kwargs, embed = payload
    return isinstance(args, list) and isinstance(kwargs, dict) and isinstance(embed, dict | None)


def _too_deep(text: bytes | str, value: Any) -> bool:
    text = text if isinstance(text, bytes) else text.encode(errors="replace")
    if text.count(b"[") + text.count(b"{") <= MOST_DEPTH:
        return False  # the quick answer for nearly every message
    level = [value]
    for _ in range(MOST_DEPTH):
        inside = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [child for child in inside if isinstance(child, dict | list)]
        if not level:
            return False
    return True
