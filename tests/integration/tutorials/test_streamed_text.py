"""`pipe.stream`: the text of a prompt or a chat, piece by piece, from a real worker."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from pipefleet.contract.messages import JobState
from pipefleet.errors import JobFailedError, ParameterError, ResultTimeoutError
from tests.integration.tutorials.tutorial import WAIT, Tutorial

DRAWN = {"max_new_tokens": 40, "do_sample": True, "seed": 7}
BEAMS = {"num_beams": 2, "do_sample": False}
GREEDY: dict[str, Any] = {"max_new_tokens": 60, "do_sample": False}
CHAT = [{"role": "user", "content": "Tell me a story."}]


@pytest.mark.parametrize("prompt", ["Once upon a time", CHAT, "Süß — 🦜 "], ids=["text", "chat", "unicode"])
@pytest.mark.parametrize(
    "parameters",
    [GREEDY, {"max_new_tokens": 40, "do_sample": True, "seed": 7}, BEAMS],
    ids=["greedy", "drawn", "beams"],
)
def test_the_pieces_are_the_text(fleet: Tutorial, prompt: Any, parameters: dict[str, Any]) -> None:
    pipe = fleet.pipe("write")
    parameters = {"max_new_tokens": 20, **parameters}
    whole = pipe(prompt, return_full_text=False, timeout=WAIT, **parameters)
    stream = pipe.stream(prompt, timeout=WAIT, **parameters)
    pieces = list(stream)
    assert "".join(pieces) == stream.text == whole[0]["generated_text"]
    assert stream.result() == whole
    assert all(pieces)


def test_a_text_comes_before_its_end(fleet: Tutorial) -> None:
    pipe = fleet.pipe("write")
    with pipe.stream("Once", timeout=WAIT, max_new_tokens=2000, do_sample=False) as stream:
        first = next(stream)
        assert first
        assert stream.job.status() is JobState.RUNNING
    assert stream.job.status() is JobState.CANCELLED


def test_a_model_of_pictures_and_texts(fleet: Tutorial) -> None:
    pipe = fleet.pipe("chat")
    parameters: dict[str, Any] = {"generate_kwargs": {"max_new_tokens": 12, "do_sample": False}, "timeout": WAIT}
    stream = pipe.stream(CHAT, **parameters)
    pieces = list(stream)
    assert stream.result() == pipe(CHAT, return_full_text=False, **parameters)
    assert "".join(pieces) == stream.result()[0]["generated_text"]


def test_several_at_once_and_in_an_event_loop(fleet: Tutorial) -> None:
    pipe = fleet.pipe("write")
    prompts = [f"Story {index}" for index in range(6)]
    whole = [one[0]["generated_text"] for one in pipe(prompts, return_full_text=False, **GREEDY)]

    async def read(prompt: str) -> str:
        return "".join([piece async for piece in pipe.stream(prompt, timeout=WAIT, **GREEDY)])

    async def read_all() -> list[str]:
        return list(await asyncio.gather(*map(read, prompts)))

    assert asyncio.run(read_all()) == whole
    found: dict[int, str] = {}

    def consume(index: int) -> None:
        found[index] = "".join(pipe.stream(prompts[index], timeout=WAIT, **GREEDY))

    threads = [threading.Thread(target=consume, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert [found[index] for index in range(6)] == whole


def test_a_failure_is_raised(fleet: Tutorial) -> None:
    pipe = fleet.pipe("write")
    with pytest.raises(JobFailedError):
        next(pipe.stream("a", timeout=WAIT, eos_token_id=10_000_000))


def test_a_stream_that_takes_too_long_is_cancelled(fleet: Tutorial) -> None:
    stream = fleet.pipe("write").stream("a", timeout=0.0, max_new_tokens=2000)
    with pytest.raises(ResultTimeoutError, match="was cancelled"):
        list(stream)
    assert stream.job.status() is JobState.CANCELLED


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"return_full_text": True}, "new text alone"),
        ({"num_return_sequences": 2, "do_sample": True}, "one text"),
        ({"return_tensors": True}, "leave return_tensors out"),
        ({"batch": 2}, "batch"),
    ],
)
def test_calls_that_cannot_be_streamed(fleet: Tutorial, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        fleet.pipe("write").stream("a", **parameters)


def test_a_task_without_text(fleet: Tutorial) -> None:
    with pytest.raises(ParameterError, match="no text that can be streamed"):
        fleet.pipe("classify").stream("a")
