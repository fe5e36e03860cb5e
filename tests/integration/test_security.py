"""Attacks on a running worker: messages that no producer of ours would send, put into its queue by another program."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

import pipefleet
from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage
from pipefleet.queues.celery import celery_app
from pipefleet.storage.store import ObjectStore
from tests.checkpoints.media import audio, wav_bytes

WAIT = 60
SPEECH = "automatic-speech-recognition"


def failure(client: Client, queue: str, item: JobItem, task: str, **fields: Any) -> pipefleet.JobFailedError:
    """What becomes of a message that went around the producer's checks."""
    message = JobMessage(uuid.uuid4().hex, task, items=(item,), **fields)
    app = celery_app(client.settings)
    app.send_task("pipefleet.infer", args=[message.to_json()], queue=queue, ignore_result=True)
    with pytest.raises(pipefleet.JobFailedError) as caught:
        client.job(message.id).result(WAIT)
    return caught.value


@pytest.fixture
def code(tmp_path: Path) -> tuple[Path, Path]:
    """A folder with code in the form that `custom_generate` runs, and the file that it makes when it does."""
    marker = tmp_path / "ran"
    (tmp_path / "custom_generate").mkdir()
    source = f"import pathlib\ndef generate(*a, **k):\n    pathlib.Path({str(marker)!r}).touch()\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(source)
    return tmp_path, marker


@pytest.mark.parametrize("where", ["of the job", "of the item"])
def test_arguments_that_run_code_are_refused_by_the_worker_itself(
    client: Client, store: ObjectStore, prefix: str, code: tuple[Path, Path], where: str
) -> None:
    folder, marker = code
    store.put(f"{prefix}a.wav", wav_bytes(audio(1.0)))
    attack = {"generate_kwargs": {"custom_generate": str(folder), "trust_remote_code": True}}
    inputs = {"$ref": f"{prefix}a.wav"}
    job, item = ({}, attack) if where == "of the item" else (attack, {})
    error = failure(client, f"pipefleet.{SPEECH}", JobItem("0", inputs, item), SPEECH, parameters=job)
    assert error.failure_code == "bad_parameter"
    assert not marker.exists()


@pytest.mark.parametrize("inputs", ["/etc/hostname", "http://127.0.0.1:9/a.wav", {"$ref": "file:///etc/hostname"}])
def test_strings_in_the_place_of_a_recording_are_refused_by_the_worker_itself(client: Client, inputs: Any) -> None:
    error = failure(client, f"pipefleet.{SPEECH}", JobItem("0", inputs), SPEECH)
    assert error.failure_code in ("bad_input", "bad_contract")


def test_the_worker_goes_on_after_an_attack(client: Client) -> None:
    queue = "pipefleet.text-classification"
    attack = JobItem("0", {"text": ["nested"] * 100, "__class__": "x"})
    assert failure(client, queue, attack, "text-classification").failure_code == "bad_input"
    assert client.submit("text-classification", "still there?").result(WAIT)
