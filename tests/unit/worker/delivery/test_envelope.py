"""The check of messages that anybody may have written: no shape may come out as anything but a good envelope or MalformedError."""

from __future__ import annotations

import base64
import bz2
import copy
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu import compression
from kombu.transport.virtual import Channel as VirtualChannel
from kombu.transport.virtual import Message

from pipefleet.contract.messages import MAX_WIRE_BYTES, TASK_NAME
from pipefleet_workers.delivery.envelope import (
    MalformedError,
    check_message,
    mark,
    read_envelope,
    refuse_compression,
)
from tests.integration.lease_world import envelope

CHANNEL: Any = VirtualChannel.__new__(VirtualChannel)
PROPERTIES = envelope("a")["properties"]


def opened(value: Any) -> Any:
    message = Message(read_envelope(json.dumps(value).encode()), channel=CHANNEL)
    check_message(message)
    return message


def changed(path: str, value: Any) -> dict[str, Any]:
    one: Any = copy.deepcopy(envelope("a"))
    *parents, last = path.split("/")
    place = one
    for name in parents:
        place = place[name]
    place[last] = value
    return dict(one)


def test_a_good_message_is_read_and_marked() -> None:
    raw = read_envelope(json.dumps(envelope("a", lang="py")).encode())
    mark(raw, 2, 1)
    assert raw["headers"] == {
        "task": "note",
        "id": "a",
        "lang": "py",
        "x-delivery-count": 2,
        "x-retry-count": 1,
        "redelivered": True,
    }
    assert raw["properties"]["delivery_info"]["redelivered"] is True


def test_a_first_delivery_is_not_marked_as_repeated() -> None:
    raw = read_envelope(json.dumps(envelope("a")).encode())
    mark(raw, 1, 0)
    assert raw["headers"]["redelivered"] is False


def test_a_worker_whose_clock_is_years_late_judges_an_eta_by_the_servers() -> None:
    years = 3 * 365 * 86_400.0
    eta = datetime.fromtimestamp(time.time() + years, UTC).isoformat()
    raw = json.dumps(changed("headers", {"task": TASK_NAME, "id": "a", "eta": eta})).encode()
    with pytest.raises(MalformedError, match="more than a year ahead"):
        read_envelope(raw)
    assert read_envelope(raw, lambda: time.time() + years - 10.0)["headers"]["eta"] == eta


def test_a_message_without_headers_gets_some() -> None:
    assert read_envelope(json.dumps(changed("headers", None)).encode())["headers"] == {}


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"__type__": "uuid", "__value__": 3}', "no properties"),
        (b"[" * 100_000 + b"]" * 100_000, "not JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no properties"),
    ],
)
def test_what_is_no_message_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        read_envelope(raw)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("headers", [], "headers"),
        ("headers", "text", "headers"),
        ("headers/task", ["list"], "task"),
        ("headers/id", None, "id"),
        ("properties", [], "properties"),
        ("properties/delivery_tag", 7, "delivery tag"),
        ("properties/delivery_info", "x", "delivery info"),
        ("properties/body_encoding", "rot13", "encoding"),
        ("properties/body_encoding", 1, "encoding"),
        ("body", None, "body"),
        ("body", {"a": 1}, "body"),
        ("content-type", 3, "content-type"),
        ("content-encoding", {}, "content-encoding"),
    ],
)
def test_a_wrong_part_is_named(path: str, value: Any, why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        read_envelope(json.dumps(changed(path, value)).encode())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("body", "{not json"),
        ("headers/compression", "zlib"),
        ("headers/compression", "no-such-method"),
    ],
)
def test_what_only_decoding_shows_is_refused_too(path: str, value: Any) -> None:
    with pytest.raises(MalformedError):
        opened(changed(path, value))


def test_the_decoded_body_is_kept_for_the_consumer() -> None:
    message = opened(envelope("a"))
    assert message.payload is message.payload
    assert message.payload == [["a"], {}, None]


def stock_message(**parts: Any) -> Any:
    """As Celery's own transport makes one."""
    return Message({**envelope("a"), **parts}, channel=CHANNEL)


def test_kombu_itself_unpacks_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_decoders", dict(compression._decoders))
    refuse_compression()
    body = base64.b64encode(bz2.compress(b"[]" * 1_000_000)).decode()
    for kind in compression.encoders():
        headers = {**envelope("a")["headers"], "compression": kind}
        message = stock_message(headers=headers, body=body, properties={**PROPERTIES, "body_encoding": "base64"})
        assert len(message.errors) == 1
        with pytest.raises(MalformedError):
            check_message(message)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"content-type": "application/x-python-serialize"}, "content-type"),
        ({"content-type": "application/data"}, "content-type"),
        ({"content-encoding": "zip"}, "content-encoding"),
        ({"body": '"' + "x" * MAX_WIRE_BYTES + '"'}, "too_large"),
        ({"body": f"[[{'9' * 100_000}], {{}}, null]"}, "not JSON"),
        ({"body": "[[], {}]"}, "arguments"),
        ({"body": '{"task": "celery.chain"}'}, "arguments"),
        ({"body": f"[[{'[' * 101}{']' * 101}], {{}}, null]"}, "deep"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_message_of_celerys_own_transport_is_checked_too(parts: dict[str, Any], why: str) -> None:
    with pytest.raises(MalformedError, match=why):
        check_message(stock_message(**parts))


def test_what_claims_to_be_of_another_type_stays_json() -> None:
    claim = {"__type__": "decimal", "__value__": "1e999999"}
    message = stock_message(body=json.dumps([[claim], {}, None]))
    check_message(message)
    assert message.payload[0] == [claim]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_places = st.sampled_from(
    [
        "headers",
        "headers/task",
        "headers/id",
        "headers/compression",
        "properties",
        "properties/delivery_tag",
        "properties/delivery_info",
        "properties/body_encoding",
        "properties/priority",
        "body",
        "content-type",
        "content-encoding",
    ]
)


@given(_places, _values)
def test_no_value_anywhere_raises_anything_else(path: str, value: Any) -> None:
    try:
        raw = read_envelope(json.dumps(changed(path, value)).encode())
    except MalformedError:
        return
    assert isinstance(raw["headers"], dict)
    mark(raw, 1, 0)


@given(st.binary(max_size=64))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(MalformedError):
        read_envelope(raw)
