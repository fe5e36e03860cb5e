"""The decode stage: texts from objects, pairs of texts, and values of a kind that the task does not take."""

from __future__ import annotations

from typing import Any

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.tasks import task_spec
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.inputs.decode import Decoder
from pipefleet_workers.items import Blob, Fetched, ItemError, JobContext, Work
from pipefleet_workers.settings import WorkerSettings


def decode(task: str, value: Any, *, max_text_bytes: int = 1000) -> Any:
    decoder = Decoder(task_spec(task), WorkerSettings(max_text_bytes=max_text_bytes), sampling_rate=16_000)
    context = JobContext("job", None, {}, 3, None, Outcomes(range(1)))
    work = Work(context, 0, JobItem("0", None), {}, 1)
    decoded = decoder.decode(Fetched(work, value))
    assert decoded.work is work
    assert work.seconds["decode"] >= 0
    return decoded.value


def blob(content: bytes) -> Blob:
    return Blob("s3://bucket/key.txt", content, "text/plain")


def refusal(task: str, value: Any) -> str:
    with pytest.raises(ItemError) as caught:
        decode(task, value)
    return caught.value.failure.code


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"plain", "plain"),
        ("gr\u00fc\u00df dich, \u4e16\u754c \U0001f600\n".encode(), "gr\u00fc\u00df dich, \u4e16\u754c \U0001f600\n"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b" spaces stay \r\n", " spaces stay \r\n"),
        (b"x" * 1000, "x" * 1000),
    ],
)
def test_objects_are_read_as_utf8(content: bytes, text: str) -> None:
    assert decode("text-classification", blob(content)) == text


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("gr\u00fc\u00df dich".encode("latin-1"), "bad_media"),
        ("hello".encode("utf-16"), "bad_media"),
        (b"\xed\xa0\x80", "bad_media"),
        (b"x" * 1001, "too_large"),
    ],
)
def test_objects_that_are_no_text_are_refused(content: bytes, code: str) -> None:
    assert refusal("text-classification", blob(content)) == code


def test_a_refusal_names_the_object_and_never_its_content() -> None:
    with pytest.raises(ItemError) as caught:
        decode("feature-extraction", blob(b"secret \xff"))
    assert "s3://bucket/key.txt" in caught.value.failure.message
    assert "secret" not in caught.value.failure.message


def test_fields_are_decoded_one_by_one() -> None:
    value = {"text": "inline", "text_pair": blob(b"stored")}
    assert decode("text-classification", value) == {"text": "inline", "text_pair": "stored"}


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("text-classification", {"text": "a", "other": "b"}),
        ("text-classification", {}),
        ("text-classification", ["a", "b"]),
        ("text-classification", 5),
        ("text-classification", None),
        ("text-classification", {"text": 5}),
        ("feature-extraction", {"text": "a"}),
        ("image-classification", "/etc/passwd"),
        ("image-classification", "https://example.org/cat.png"),
        ("image-classification", {"text": "a"}),
        ("automatic-speech-recognition", "/etc/passwd"),
        ("automatic-speech-recognition", "http://127.0.0.1/speech.wav"),
        ("automatic-speech-recognition", [0.0, 0.1]),
        ("automatic-speech-recognition", {"raw": [0.0], "sampling_rate": 16_000}),
    ],
)
def test_what_a_task_does_not_take_is_refused(task: str, value: Any) -> None:
    assert refusal(task, value) == "bad_input"
