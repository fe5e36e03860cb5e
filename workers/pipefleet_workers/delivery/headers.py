"""Keeps the few headers and properties that Celery and this worker read, each of the right type and bounded. `envelope` calls it.

All other headers are dropped, among them headers that ask a worker to send further messages or to write results. A wrong type in a
header that matters raises MalformedError; other wrong headers are dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from celery.utils.time import maybe_iso8601

from pipefleet.queues.celery import COST_HEADER, SHARD_HEADER, TIME_HEADER

MOST_ID = 200
"""Characters of an id."""
MOST_WAIT = 366 * 86_400.0
"""Seconds from now; a message that must begin later than this is refused."""
MOST_STAMPS = 100
_NEVER = 10 * MOST_WAIT
"""Seconds from now; a message that expires later than this does not expire."""
_TEXTS = {"root_id": MOST_ID, "parent_id": MOST_ID, "lang": 40, "traceparent": 200, "tracestate": 1024}
_SHOWN = ("argsrepr", "kwargsrepr")
_MOST_SHOWN = 2048
"""Characters of a text that is only displayed; Celery's own producers write 1,024."""
_NUMBERS = (COST_HEADER, TIME_HEADER)
_LOWEST = 9


class MalformedError(Exception):
    """The message cannot be delivered. The text gives the reason in a few words and repeats nothing of the message."""


def checked_headers(headers: Any, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """The headers that are kept. Raises MalformedError when a header that matters has the wrong type."""
    if headers is None:
        return {}
    if not isinstance(headers, dict):
        raise MalformedError("its headers are no object")
    if headers.get("compression") is not None:
        raise MalformedError("its body is compressed")
    kept: dict[str, Any] = {}
    if "task" in headers:
        kept = {"task": _named(headers["task"], "task"), "id": _named(headers.get("id"), "id")}
    for name, most in _TEXTS.items():
        if _is_text(value := headers.get(name), most):
            kept[name] = value
    for name in _SHOWN:
        if isinstance(value := headers.get(name), str):
            kept[name] = value[:_MOST_SHOWN].encode(errors="replace").decode()
    for name in _NUMBERS:
        value = headers.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            kept[name] = value
    if headers.get(SHARD_HEADER) is True:
        kept[SHARD_HEADER] = True
    return {**kept, **_times(headers, clock), **_stamps(headers)}


def checked_properties(properties: Any) -> dict[str, Any]:
    """The properties that are kept. Raises MalformedError without a delivery tag and delivery info."""
    if not isinstance(properties, dict):
        raise MalformedError("it has no properties")
    tag, info = properties.get("delivery_tag"), properties.get("delivery_info")
    if not isinstance(tag, str):
        raise MalformedError("it has no delivery tag")
    if not isinstance(info, dict):
        raise MalformedError("it has no delivery info")
    where = {name: info[name] for name in ("exchange", "routing_key") if isinstance(info.get(name), str)}
    kept: dict[str, Any] = {"delivery_tag": tag, "delivery_info": where}
    priority = properties.get("priority")
    if type(priority) is int:
        kept["priority"] = min(_LOWEST, max(0, priority))
    if _is_text(name := properties.get("correlation_id"), MOST_ID):
        kept["correlation_id"] = name
    return {**kept, "body_encoding": properties.get("body_encoding")}


def _named(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise MalformedError("its headers name no task and id")
    if not _is_text(value, MOST_ID):
        raise MalformedError(
            f"the {what} in its headers must have 1 to {MOST_ID} characters, none of them a control character"
        )
    return value


def _is_text(value: Any, most: int) -> bool:
    """Whether `value` is a text of 1 to `most` characters, with a UTF-8 form, on one line."""
    if not isinstance(value, str) or not 0 < len(value) <= most:
        return False
    return value.isprintable() or not any(ord(one) < 32 or one in "\x7f\x85\u2028\u2029" or _odd(one) for one in value)


def _odd(one: str) -> bool:
    """Whether a character is half of a surrogate pair, or a control character of the second set (C1)."""
    return 0x80 <= ord(one) < 0xA0 or 0xD800 <= ord(one) < 0xE000


def _times(headers: Mapping[str, Any], clock: Callable[[], float]) -> dict[str, str]:
    """`eta` and `expires` in the one form that all later code can read."""
    found: dict[str, str] = {}
    eta, expires = _time(headers, "eta"), _time(headers, "expires")
    if eta is None and expires is None:
        return found
    now = clock()
    if eta is not None:
        if eta - now > MOST_WAIT:
            raise MalformedError("its eta is more than a year ahead")
        found["eta"] = _written(eta)
    if expires is not None and expires - now < _NEVER:
        found["expires"] = _written(expires)
    return found


def _time(headers: Mapping[str, Any], name: str) -> float | None:
    value = headers.get(name)
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str) or len(value) > 64:
            raise TypeError
        when: datetime = maybe_iso8601(value)
        return max(0.0, (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())
    except (ValueError, TypeError, ArithmeticError):
        raise MalformedError(f"its {name} is no time in ISO 8601") from None


def _written(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _stamps(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The stamps that an operator may revoke by: their names, and for each name a text or a list of texts."""
    names, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if not isinstance(names, list) or not isinstance(stamps, Mapping):
        return {}
    kept = [name for name in names[:MOST_STAMPS] if _is_text(name, MOST_ID) and _is_stamp(stamps.get(name))]
    return {"stamped_headers": kept, "stamps": {name: stamps[name] for name in kept}} if kept else {}


def _is_stamp(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return len(values) <= MOST_STAMPS and all(type(one) in (int, bool) or _is_text(one, MOST_ID) for one in values)
