"""Chats that come back: a result names the media of a chat's messages, the caller has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_media(output: Any, given: Any) -> Any:
    """The records of a result with the very media of the chat that was `given`, so that the chat can go on from there."""
    chat = given.get("text") if isinstance(given, Mapping) else given
    if not isinstance(chat, list | tuple) or not isinstance(output, list):
        return output
    return [{name: _filled(value, chat) for name, value in record.items()} for record in output]


def _filled(value: Any, chat: list[Any] | tuple[Any, ...]) -> Any:
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        return value
    return [_message(one, chat[place]["content"]) if place < len(chat) else one for place, one in enumerate(value)]


def _message(message: Mapping[str, Any], given: Any) -> dict[str, Any]:
    parts = message["content"]
    if not isinstance(parts, list) or not isinstance(given, list | tuple):
        return dict(message)
    return {**message, "content": [_part(one, *given[place : place + 1]) for place, one in enumerate(parts)]}


def _part(part: Mapping[str, Any], given: Any = None) -> Any:
    """A part that is named and no more is the one that was given."""
    return given if given is not None and set(part) == {"type"} else part
