"""A chat that comes back from the fleet is the one that was given, with its media."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipefleet.pipelines import FleetPipeline
from pipefleet.pipelines.chats import with_media
from pipefleet.tasks import task_spec

PICTURE = object()
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what?"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:…"}}]},
]
NAMED: list[dict[str, Any]] = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    {"role": "user", "content": [{"type": "image"}]},
]
SAID: dict[str, Any] = {"role": "assistant", "content": "a cat"}


@pytest.mark.parametrize("given", [CHAT, tuple(CHAT), {"text": CHAT}])
def test_media_of_a_chat_come_back(given: Any) -> None:
    record = {"input_text": NAMED, "generated_text": [*NAMED, SAID]}
    assert with_media([record], given) == [{"input_text": CHAT, "generated_text": [*CHAT, SAID]}]
    found = with_media([record], given)[0]["generated_text"][1]["content"][0]["image"]
    assert found is PICTURE


def test_a_message_that_was_gone_on_with_keeps_what_was_written() -> None:
    begun = [CHAT[1], {"role": "assistant", "content": "It is"}]
    written = [NAMED[1], {"role": "assistant", "content": [{"type": "text", "text": "It is a cat"}]}]
    assert with_media([{"generated_text": written}], begun) == [{"generated_text": [CHAT[1], written[1]]}]


@pytest.mark.parametrize("given", ["what?", {"text": "what?", "images": PICTURE}, CHAT])
def test_texts_and_tokens_stay(given: Any) -> None:
    output = [{"input_text": "what?", "generated_text": "a cat"}, {"generated_token_ids": [3, 4]}]
    assert with_media(output, given) == output


class Naming(FleetPipeline):
    """A pipeline whose jobs answer with the chat as workers send it back."""

    def __init__(self) -> None:
        client: Any = SimpleNamespace(settings=SimpleNamespace(in_flight=2))
        super().__init__(client, task_spec("image-text-to-text"), model=None, revision=None)

    def _submit(self, inputs: Any, patience: Any, **parameters: Any) -> Any:
        named = [{"role": "user", "content": [{"type": "image"}]}]
        return SimpleNamespace(result=lambda timeout: [{"generated_text": [*named, SAID]}], warnings=())


def test_each_chat_of_a_call_has_its_own_media() -> None:
    chats = [[{"role": "user", "content": [{"type": "image", "image": object()}]}] for _ in range(5)]
    wanted: list[Any] = [[{"generated_text": [*chat, SAID]}] for chat in chats]
    pipe = Naming()
    assert pipe(chats[0]) == wanted[0]
    assert pipe(text=chats[0]) == wanted[0]
    assert pipe(chats) == wanted
    assert list(pipe(chat for chat in chats)) == wanted
    assert list(pipe({"text": chat} for chat in chats)) == wanted
