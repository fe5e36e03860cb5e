"""An idempotency key stands for one request: the same again is the same job, another is a conflict."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipefleet.client import Client
from pipefleet.contract.messages import JobState
from pipefleet.contract.records import request_digest
from pipefleet.errors import ConflictError, ContractError
from pipefleet.queues.keys import idempotency_key
from pipefleet.queues.looking import queue_depth
from tests.unit.conftest import eventually
from tests.unit.producer.client.test_jobs import QUEUE, TEXTS, Worker

SPEECH = "automatic-speech-recognition"
FIRST: dict[str, Any] = {"task": TEXTS, "inputs": "good", "parameters": {"top_k": 2}}


def submit(client: Client, **request: Any) -> str:
    task, inputs = request.pop("task"), request.pop("inputs")
    return client.submit(task, inputs, idempotency_key="k", **request).id


@pytest.mark.parametrize(
    "other",
    [
        {"inputs": "bad"},
        {"inputs": {"text": "good"}},
        {"task": "image-classification", "inputs": "s3://pipefleet/a.png", "parameters": {}},
        {"parameters": {"top_k": 3}},
        {"parameters": {}},
        {"model": "/models/texts"},
        {"output": "s3://pipefleet/out/"},
    ],
)
def test_another_request_is_a_conflict_that_names_the_first_job(client: Client, other: dict[str, Any]) -> None:
    first = submit(client, **FIRST)
    with pytest.raises(
        ConflictError, match=rf"the idempotency key 'k' stands for another request, whose job is {first}"
    ) as caught:
        submit(client, **{**FIRST, **other})
    assert (caught.value.job_id, caught.value.code, caught.value.exit_code) == (first, "conflict", 2)
    assert "good" not in str(caught.value)
    assert queue_depth(client.redis, QUEUE)["normal"] == 1
    assert len(client.redis.keys("pipefleet:job:*")) == 1  # type: ignore[arg-type]
    assert submit(client, **FIRST) == first


@pytest.mark.parametrize("again", [{}, {"priority": "high"}, {"expires": 60}, {"task": "sentiment-analysis"}])
def test_the_same_request_is_the_first_job_however_urgent(client: Client, again: dict[str, Any]) -> None:
    assert submit(client, **FIRST) == submit(client, **{**FIRST, **again})


def test_equal_inputs_are_the_same_whatever_their_order(client: Client) -> None:
    first = submit(
        client, task=TEXTS, inputs={"text": "a", "text_pair": "b"}, parameters={"top_k": 2, "function_to_apply": "none"}
    )
    second = {
        "task": TEXTS,
        "inputs": {"text_pair": "b", "text": "a"},
        "parameters": {"function_to_apply": "none", "top_k": 2},
    }
    assert submit(client, **second) == first


def test_uploads_are_the_same_by_their_content(client: Client, tmp_path: Path) -> None:
    for name, content in (("one.wav", b"sound"), ("two.wav", b"sound"), ("three.wav", b"noise")):
        (tmp_path / name).write_bytes(content)
    first = submit(client, task=SPEECH, inputs=str(tmp_path / "one.wav"))
    assert submit(client, task=SPEECH, inputs=str(tmp_path / "two.wav")) == first
    with pytest.raises(ConflictError):
        submit(client, task=SPEECH, inputs=str(tmp_path / "three.wav"))


def test_a_long_text_that_lies_in_the_store_is_compared_as_well(client: Client) -> None:
    text = "long " * 10_000
    first = submit(client, task=TEXTS, inputs=text)
    assert submit(client, task=TEXTS, inputs=text) == first
    with pytest.raises(ConflictError):
        submit(client, task=TEXTS, inputs=text + "er")


def test_of_two_requests_at_once_one_wins_and_the_other_is_a_conflict(client: Client) -> None:
    def one(number: int) -> str | None:
        try:
            return submit(client, task=TEXTS, inputs=f"text {number % 2}")
        except ConflictError as error:
            return f"conflict with {error.job_id}"

    with ThreadPoolExecutor(8) as threads:
        ends = list(threads.map(one, range(16)))
    jobs = {end for end in ends if end and not end.startswith("conflict")}
    assert len(jobs) == 1
    assert {end for end in ends if end not in jobs} == {f"conflict with {next(iter(jobs))}"}
    assert queue_depth(client.redis, QUEUE)["normal"] == 1


def test_it_stays_a_conflict_after_the_first_job_has_ended(client: Client) -> None:
    first = client.submit(TEXTS, "a", idempotency_key="k")
    Worker(client).answer(1)
    assert eventually(lambda: first.status() is JobState.SUCCEEDED)
    with pytest.raises(ConflictError):
        client.submit(TEXTS, "b", idempotency_key="k")
    assert client.submit(TEXTS, "a", idempotency_key="k").result(20) == 1


def test_a_key_of_an_earlier_release_stands_for_any_request(client: Client) -> None:
    client.redis.set(idempotency_key("k"), "the-first")
    assert client.submit(TEXTS, "a", idempotency_key="k").id == "the-first"


def test_a_long_key_is_told_in_part(client: Client) -> None:
    client.submit(TEXTS, "a", idempotency_key="k" * 500)
    with pytest.raises(ConflictError) as caught:
        client.submit(TEXTS, "b", idempotency_key="k" * 500)
    assert len(str(caught.value)) < 300


def test_a_digest_is_of_json() -> None:
    assert request_digest(a=1, b=[{"x": 1, "y": 2}]) == request_digest(b=({"y": 2, "x": 1},), a=1)
    assert request_digest(a=1) != request_digest(a=2)
    with pytest.raises(ContractError):
        request_digest(a=float("nan"))
