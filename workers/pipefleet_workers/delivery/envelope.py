"""Messages as anybody may have written them: everything is checked before a consumer sees it.

Redis lists are open to every producer, and kombu and Celery end the worker on many malformed messages.
"""

from __future__ import annotations

from typing import Any

from kombu.utils.json import loads

DELIVERIES = "x-delivery-count"
RETRIES = "x-retry-count"
_ENCODINGS = ("base64", "utf-8")


class MalformedError(Exception):
    """The message cannot be delivered; says why in a few words that repeat nothing of it."""


def read_envelope(raw: bytes) -> dict[str, Any]:
    """The message as a dictionary of the shape that kombu and Celery take for granted. Raises MalformedError."""
    try:
        envelope = loads(raw)
    except (ValueError, RecursionError, TypeError, LookupError, ArithmeticError, AttributeError):
        raise MalformedError("it is not JSON") from None
    if not isinstance(envelope, dict):
        raise MalformedError("it is not a JSON object")
    _check_properties(envelope.get("properties"))
    _check_body(envelope)
    envelope["headers"] = _checked_headers(envelope.get("headers"))
    return envelope


def mark(envelope: dict[str, Any], deliveries: int, retries: int) -> None:
    """Write into the headers how often the message was delivered (this time included) and given back with a delay."""
    again = deliveries > 1
    envelope["headers"].update({DELIVERIES: deliveries, RETRIES: retries, "redelivered": again})
    envelope["properties"]["delivery_info"]["redelivered"] = again


def check_message(message: Any) -> None:
    """Check what only decoding shows. Raises MalformedError; the decoded body stays with the message, so nothing is done twice."""
    if message.errors:
        raise MalformedError("its body cannot be decompressed")
    if message.content_type != "application/json":
        return  # the consumer's accept list decides
    message.accept = {"application/json"}
    try:
        _ = message.payload
    except Exception:  # noqa: BLE001 - an unknown character set, bad JSON, foreign types: all are the message's fault
        raise MalformedError("its body is not JSON") from None


def _check_properties(properties: Any) -> None:
    if not isinstance(properties, dict):
        raise MalformedError("it has no properties")
    if not isinstance(properties.get("delivery_tag"), str):
        raise MalformedError("it has no delivery tag")
    if not isinstance(properties.get("delivery_info"), dict):
        raise MalformedError("it has no delivery info")
    encoding = properties.get("body_encoding")
    if encoding is not None and (not isinstance(encoding, str) or encoding.lower() not in _ENCODINGS):
        raise MalformedError("its body has an unknown encoding")


def _check_body(envelope: dict[str, Any]) -> None:
    if not isinstance(envelope.get("body"), str):
        raise MalformedError("its body is no text")
    for name in ("content-type", "content-encoding"):
        if not isinstance(envelope.get(name), str | None):
            raise MalformedError(f"its {name} is no text")


def _checked_headers(headers: Any) -> dict[str, Any]:
    if headers is None:
        return {}
    if not isinstance(headers, dict):
        raise MalformedError("its headers are no object")
    if "task" in headers and not (isinstance(headers["task"], str) and isinstance(headers.get("id"), str)):
        raise MalformedError("its headers name no task and id")
    return headers
