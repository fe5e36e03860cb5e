"""The check of messages that anybody may have written: no shape may come out as anything but a good envelope or MalformedError."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport.virtual import Channel as VirtualChannel
from kombu.transport.virtual import Message

from pipefleet_workers.delivery.envelope import MalformedError, check_message, mark, read_envelope
from tests.integration.lease_world import envelope

CHANNEL: Any = VirtualChannel.__new__(VirtualChannel)


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
