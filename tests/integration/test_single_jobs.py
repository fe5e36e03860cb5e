"""Single jobs through the real system: what comes back, states, cancel, expiry, priorities, uploads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import pipeline as direct_pipeline

import pipefleet
from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, JobState, Priority
from pipefleet.queues.celery import celery_app
from pipefleet.queues.keys import job_key
from pipefleet.storage.store import ObjectStore
from tests.checkpoints import cached
from tests.checkpoints.media import audio, image, jpeg_bytes, wav_bytes
from tests.conftest import Servers

WAIT = 60


@pytest.fixture(scope="module")
def classifier() -> Any:
    return direct_pipeline("text-classification", str(cached("text-classification")), device="cpu")


def test_a_job_returns_what_the_pipeline_returns(client: Client, classifier: Any) -> None:
    found = client.submit("text-classification", "a fine day").result(WAIT)
    expected = classifier("a fine day")
    assert found[0]["label"] == expected[0]["label"]
    assert found[0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)


def test_lists_generators_and_parameters_behave_like_the_pipeline(client: Client, classifier: Any) -> None:
    pipe = pipefleet.pipeline("sentiment-analysis", client=client)
    texts = ["good", "bad and long " * 20, "so so"]
    expected = classifier(texts)
    for found in (pipe(texts), list(pipe(text for text in texts)), pipe(texts, batch_size=8)):
        assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert len(pipe("good", top_k=2)) == 2
    assert [len(one) for one in pipe(texts, top_k=None)] == [len(one) for one in classifier(texts, top_k=None)]


def test_a_generator_is_consumed_lazily(servers: Servers) -> None:
    settings = pipefleet.Settings(in_flight=4)  # type: ignore[call-arg]
    taken = []
    with Client(settings) as client:
        pipe = pipefleet.pipeline("text-classification", client=client)

        def source() -> Any:
            for index in range(50):
                taken.append(index)
                yield f"text {index}"

        results = pipe(source())
        next(results)
        assert len(taken) <= 6
        results.close()


def test_media_come_from_the_bucket_from_files_and_from_memory(
    client: Client, store: ObjectStore, prefix: str, tmp_path: Path
) -> None:
    picture = image(96, 64, seed=3)
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg_bytes(picture))
    store.put(prefix + "picture.jpg", path.read_bytes())
    pipe = pipefleet.pipeline("image-classification", client=client)
    by_uri, by_path, by_bytes = pipe([prefix + "picture.jpg", str(path), path.read_bytes()], top_k=2)
    for other in (by_path, by_bytes):
        assert [one["label"] for one in other] == [one["label"] for one in by_uri]
        assert [one["score"] for one in other] == pytest.approx([one["score"] for one in by_uri], abs=1e-4)
    assert [one["label"] for one in pipe(picture, top_k=2)]


def test_samples_are_taken_at_their_own_rate(client: Client) -> None:
    pipe = pipefleet.pipeline("automatic-speech-recognition", client=client)
    samples = audio(2.0, seed=5)
    bare, with_rate = pipe([samples, {"raw": samples, "sampling_rate": 16_000}])
    assert bare == with_rate


def test_long_results_are_fetched_from_the_store(client: Client) -> None:
    job = client.submit("feature-extraction", "word " * 100)
    found = np.asarray(job.result(WAIT))
    assert job.record().output_ref is not None
    assert found.ndim == 3
    assert found.shape[0] == 1
    assert found.shape[1] > 100


def test_a_result_is_also_written_where_it_was_asked_for(client: Client, store: ObjectStore, prefix: str) -> None:
    job = client.submit("text-classification", "a text", output=prefix)
    result = job.result(WAIT)
    assert result
    assert json.loads(store.get(f"{prefix}{job.id}.json")) == result


def test_jobs_are_awaitable(client: Client) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*(client.submit("text-classification", text) for text in ("one", "two")))

    assert len(asyncio.run(both())) == 2


def test_the_record_says_where_the_time_went(client: Client) -> None:
    job = client.submit("text-classification", "timed")
    job.result(WAIT)
    record = job.record()
    assert record.state is JobState.SUCCEEDED
    assert {"preprocess", "forward"} <= set(record.timings)
    assert record.submitted is not None
    assert record.finished is not None
    assert record.finished >= record.submitted


def test_an_idempotency_key_submits_once(client: Client) -> None:
    first = client.submit("text-classification", "once", idempotency_key="test-once")
    second = client.submit("text-classification", "once", idempotency_key="test-once")
    assert first.id == second.id
    assert first.result(WAIT) == second.result(WAIT)


def test_a_cancelled_job_stays_cancelled(client: Client) -> None:
    queue = "pipefleet.text-classification"
    message = JobMessage("cancel-me", "text-classification", items=(JobItem("0", "text"),))
    client.redis.hset(job_key(message.id), "state", "queued")
    job = client.job(message.id)
    assert job.cancel()
    client.publish([message], queue, Priority.NORMAL)
    client.submit("text-classification", "after it").result(WAIT)
    assert job.status() is JobState.CANCELLED
    with pytest.raises(pipefleet.JobCancelledError):
        job.result(WAIT)
    assert not job.cancel()


def test_an_expired_job_says_so(client: Client) -> None:
    with pytest.raises(pipefleet.JobExpiredError):
        client.submit("text-classification", "too late", expires=1e-6).result(WAIT)


def test_a_result_that_is_not_there_in_time_can_be_waited_for_again(client: Client) -> None:
    job = client.submit("automatic-speech-recognition", {"raw": audio(3.0), "sampling_rate": 16_000})
    with pytest.raises(pipefleet.ResultTimeoutError):
        job.result(timeout=0.0)
    assert "text" in job.result(WAIT)


def test_any_celery_client_can_submit(client: Client, servers: Servers) -> None:
    app = celery_app(client.settings)
    message = JobMessage("from-celery", "text-classification", items=(JobItem("0", "hello"),))
    app.send_task(
        "pipefleet.infer", args=[message.to_json()], queue="pipefleet.text-classification", ignore_result=True
    )
    assert client.job("from-celery").result(WAIT)


def test_a_job_for_another_model_is_refused_by_name(client: Client) -> None:
    message = JobMessage("wrong-model", "text-classification", model="org/other", items=(JobItem("0", "hello"),))
    client.publish([message], "pipefleet.text-classification", Priority.NORMAL)
    with pytest.raises(pipefleet.JobFailedError, match="org/other") as caught:
        client.job("wrong-model").result(WAIT)
    assert caught.value.failure_code == "wrong_pool"


def test_malformed_messages_leave_the_worker_serving(client: Client, servers: Servers) -> None:
    app = celery_app(client.settings)
    for payload in ({}, {"version": 99}, [], {"version": 1, "id": "x" * 500, "task": "?"}):
        app.send_task("pipefleet.infer", args=[payload], queue="pipefleet.text-classification", ignore_result=True)
    assert client.submit("text-classification", "still there?").result(WAIT)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_object"),
        (b"no picture at all", "bad_media"),
        (jpeg_bytes(image(64, 64))[:-40], "truncated_media"),
        (wav_bytes(audio(0.2)), "bad_media"),
    ],
)
def test_a_bad_object_fails_with_a_code_and_a_sentence(
    client: Client, store: ObjectStore, prefix: str, content: bytes, code: str
) -> None:
    store.put(prefix + "object", content)
    with pytest.raises(pipefleet.JobFailedError) as caught:
        client.submit("image-classification", prefix + "object").result(WAIT)
    assert caught.value.failure_code == code
    assert prefix + "object" in str(caught.value)


def test_a_missing_object_and_a_missing_bucket_are_told_apart_from_bad_media(client: Client, prefix: str) -> None:
    for uri in (prefix + "nothing-here.jpg", "s3://no-such-bucket/picture.jpg"):
        with pytest.raises(pipefleet.JobFailedError) as caught:
            client.submit("image-classification", uri).result(WAIT)
        assert caught.value.failure_code == "not_found"
