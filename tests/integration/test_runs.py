"""Bulk runs through the real system: order, failures, reopening, resuming, cancelling, killed clients."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import av
import pytest

from pipefleet.client import Client
from pipefleet.contract.layout import RunLayout
from pipefleet.errors import ManifestError, PipefleetError, RunError, SourceError
from pipefleet.queues.keys import run_key
from pipefleet.queues.looking import queued_ids
from pipefleet.storage.store import ObjectStore
from tests.checkpoints.media import audio, image, jpeg_bytes, sound_bytes

WAIT = 120


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of `condition`, looked at until a deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)
    return value


def put_manifest(store: ObjectStore, uri: str, rows: list[Any]) -> str:
    store.put(uri, "\n".join(json.dumps(row) for row in rows).encode())
    return uri


def test_every_item_appears_once_and_in_order(client: Client, prefix: str) -> None:
    texts = [f"text number {index} " * (1 + index % 7) for index in range(300)]
    run = client.map("text-classification", (text for text in texts), output=prefix)
    ended = run.wait(timeout=WAIT)
    assert (ended.state, ended.items, ended.succeeded, ended.failed) == ("succeeded", 300, 300, 0)
    rows = list(run.results())
    assert [row["input"] for row in rows] == texts
    assert [row["id"] for row in rows] == [str(index) for index in range(300)]
    assert all(row["output"][0]["label"] for row in rows)
    assert rows[0]["provenance"]["model"].endswith("text-classification")


def test_good_items_finish_beside_bad_ones_and_the_failures_are_a_source(
    client: Client, store: ObjectStore, prefix: str
) -> None:
    for index in range(12):
        store.put(f"{prefix}in/{index:02d}.jpg", jpeg_bytes(image(40 + index, 50, seed=index)))
    store.put(f"{prefix}in/20-empty.jpg", b"")
    store.put(f"{prefix}in/21-text.jpg", b"not a picture")
    store.put(f"{prefix}in/22-cut.jpg", jpeg_bytes(image(80, 80))[:-30])
    run = client.map("image-classification", f"{prefix}in/", output=f"{prefix}out/")
    ended = run.wait(timeout=WAIT)
    assert (ended.state, ended.succeeded, ended.failed) == ("partial", 12, 3)
    codes = {row["id"].rsplit("/", 1)[-1]: row["error"]["code"] for row in run.failures()}
    assert codes == {"20-empty.jpg": "empty_object", "21-text.jpg": "bad_media", "22-cut.jpg": "truncated_media"}
    again = client.map("image-classification", run.failures_uri, output=f"{prefix}again/")
    assert again.wait(timeout=WAIT).items == 3


def test_an_item_that_cannot_be_prepared_is_a_failed_row_in_its_place(
    client: Client, store: ObjectStore, prefix: str
) -> None:
    values = ["a text", None, {"inputs": 3, "id": "three"}, b"bytes", "another text"]
    run = client.map("text-classification", iter(values), output=prefix, shard_size=3)
    ended = run.wait(timeout=WAIT)
    assert (ended.state, ended.items, ended.succeeded, ended.failed) == ("partial", 5, 2, 3)
    rows = list(run.results())
    assert [(row["id"], row["input"]) for row in rows] == [
        ("0", "a text"), ("1", None), ("three", 3), ("3", None), ("4", "another text"),
    ]  # fmt: skip
    assert [row["error"]["code"] if "error" in row else "" for row in rows] == ["", *["bad_input"] * 3, ""]
    assert [row["error"] for row in run.failures()] == [row["error"] for row in rows[1:4]]
    error = rows[2]["error"]
    assert error["stage"] == "plan"
    assert error["message"].startswith("row 3 (id 'three'): text-classification takes texts")
    again = client.map("text-classification", run.failures_uri, output=f"{prefix}again/")
    assert again.wait(timeout=WAIT).failed == 3


def test_output_below_the_source_is_not_taken_as_input(client: Client, store: ObjectStore, prefix: str) -> None:
    store.put(f"{prefix}a.jpg", jpeg_bytes(image(40, 40)))
    run = client.map("image-classification", prefix, output=f"{prefix}out/")
    assert run.wait(timeout=WAIT).items == 1
    second = client.map("image-classification", f"{prefix}a", output=f"{prefix}out2/")
    assert second.wait(timeout=WAIT).items == 1


def test_items_of_a_manifest_have_their_own_parameters(client: Client, store: ObjectStore, prefix: str) -> None:
    rows = [
        {"id": "one", "inputs": "a text", "parameters": {"top_k": 1}},
        {"id": "all", "inputs": "a text", "parameters": {"top_k": None}},
        {"inputs": {"text": "a text", "text_pair": "and its pair"}},
    ]
    run = client.map("text-classification", put_manifest(store, f"{prefix}m.jsonl", rows), output=f"{prefix}out/")
    assert run.wait(timeout=WAIT).state == "succeeded"
    one, every, pair = run.results()
    assert (one["id"], every["id"], pair["id"]) == ("one", "all", "2")
    assert len(one["output"]) == 1 < len(every["output"])
    assert pair["output"]["label"]


def test_texts_may_lie_in_objects(client: Client, store: ObjectStore, prefix: str) -> None:
    store.put(f"{prefix}in/a.txt", b"some text")
    run = client.map("text-classification", f"{prefix}in/", output=f"{prefix}out/")
    assert run.wait(timeout=WAIT).state == "succeeded"
    (row,) = run.results()
    assert row["output"][0]["label"] == client.submit("text-classification", "some text").result(WAIT)[0]["label"]


@pytest.mark.parametrize("container", ["wav", "flac", "mp3", "ogg", "m4a"])
def test_recordings_of_every_container(client: Client, store: ObjectStore, prefix: str, container: str) -> None:
    for seconds in (1.0, 35.0):
        store.put(f"{prefix}in/{seconds:.0f}.{container}", encoded(audio(seconds, seed=1), container))
    run = client.map("automatic-speech-recognition", f"{prefix}in/", output=f"{prefix}out/")
    assert run.wait(timeout=WAIT).state == "succeeded", list(run.failures())


def test_a_malformed_line_refuses_the_run_before_anything_is_written(
    client: Client, store: ObjectStore, prefix: str
) -> None:
    store.put(f"{prefix}m.jsonl", b'{"inputs": "fine"}\n{"inputs": "fine"}\n{"inputs" "broken"}\n')
    with pytest.raises(ManifestError, match=r"line 3, column 11"):
        client.map("text-classification", f"{prefix}m.jsonl", output=f"{prefix}out/")
    assert not list(store.list(f"{prefix}out/"))


@pytest.mark.parametrize(
    ("source", "output", "error"),
    [
        ("s3://no-such-bucket/x/", "out/", SourceError),
        ("{prefix}nothing/", "out/", SourceError),
        ("/no/such/folder", "out/", SourceError),
        (["text"], "s3://no-such-bucket/out/", SourceError),
        (["text"], "not-a-uri", PipefleetError),
        (42, "out/", SourceError),
    ],
)
def test_a_wrong_source_or_output_is_refused(
    client: Client, prefix: str, source: Any, output: str, error: type[Exception]
) -> None:
    source = source.format(prefix=prefix) if isinstance(source, str) else source
    output = prefix + output if output == "out/" else output
    with pytest.raises(error):
        client.map("text-classification", source, output=output)


def test_a_second_run_at_the_same_output_is_refused(client: Client, prefix: str) -> None:
    client.map("text-classification", ["one"], output=prefix).wait(timeout=WAIT)
    with pytest.raises(RunError, match="resume"):
        client.map("text-classification", ["one"], output=prefix)


def test_there_is_no_run_where_none_was_made(client: Client, prefix: str) -> None:
    with pytest.raises(RunError, match="no run"):
        client.run(prefix)


def encoded(samples: Any, container: str) -> bytes:
    """Samples at 16 kHz in a container; m4a through PyAV, the others through libsndfile."""
    if container != "m4a":
        return sound_bytes(samples, container, 16_000)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="ipod") as output:
        stream = output.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


KILLED_CLIENT = """
import sys, itertools, pipefleet
client = pipefleet.Client()
source = sys.argv[2] if len(sys.argv) > 2 else (f"text {i}" for i in itertools.count())
run = client.map("text-classification", source, output=sys.argv[1], shard_size=20)
print("started", flush=True)
run.wait()
"""


def kill_client_half_way(client: Client, output: str, *source: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED_CLIENT, output, *source], env=dict(os.environ), stdout=subprocess.PIPE
    )
    until(lambda: any(client.store.list(RunLayout.at(output).parts)))
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_a_run_outlives_its_client(client: Client, store: ObjectStore, prefix: str) -> None:
    rows = [{"inputs": f"text {index}"} for index in range(3000)]
    manifest = put_manifest(store, f"{prefix}m.jsonl", rows)
    kill_client_half_way(client, f"{prefix}out/", manifest)
    run = client.run(f"{prefix}out/")
    run.resume()
    ended = run.wait(timeout=WAIT)
    assert (ended.state, ended.items, ended.failed) == ("succeeded", 3000, 0)
    assert [row["input"] for row in run.results()] == [row["inputs"] for row in rows]


def test_planning_of_an_iterable_ends_with_its_client_and_says_so(client: Client, prefix: str) -> None:
    kill_client_half_way(client, prefix)
    run = client.run(prefix)
    with pytest.raises(RunError, match="resume"):
        run.wait(timeout=WAIT)
    with pytest.raises(RunError, match="map again"):
        run.resume()
    run.cancel()


def test_a_run_is_finished_from_object_storage_alone(client: Client, prefix: str) -> None:
    run = client.map("text-classification", [f"text {i}" for i in range(100)], output=prefix, shard_size=10)
    run.wait(timeout=WAIT)
    layout = RunLayout.at(prefix)
    for name in ("items", "failed", "parts"):
        client.redis.delete(run_key(run.id, name))
    client.redis.delete(run_key(run.id))
    for index in (3, 7):
        client.store.delete(layout.part(index))
    client.store.delete(layout.success)
    reopened = client.run(prefix)
    assert reopened.resume() == 2
    ended = reopened.wait(timeout=WAIT)
    assert (ended.state, ended.items, ended.succeeded) == ("succeeded", 100, 100)
    assert [row["id"] for row in reopened.results()] == [str(i) for i in range(100)]


def test_a_shard_that_is_delivered_twice_leaves_one_part(client: Client, prefix: str) -> None:
    from pipefleet.contract.messages import Priority
    from pipefleet.contract.shards import shard_message

    run = client.map("text-classification", ["a", "b", "c"], output=prefix)
    run.wait(timeout=WAIT)
    before = client.store.head(RunLayout.at(prefix).part(0))
    message = shard_message(run.plan, RunLayout.at(prefix), 0, 0, 3)
    client.publish([message, message], run.plan.queue, Priority.LOW)
    until(lambda: not list(queued_ids(client.redis, run.plan.queue)))
    assert client.store.head(RunLayout.at(prefix).part(0)) == before


def test_a_cancelled_run_stops_and_can_be_taken_up_again(client: Client, prefix: str) -> None:
    run = client.map("text-classification", [f"text {i}" for i in range(2000)], output=prefix, shard_size=50)
    run.cancel()
    assert run.wait(timeout=WAIT).state == "cancelled"
    until(lambda: not list(queued_ids(client.redis, run.plan.queue)))
    run.join_planner()
    run.resume()
    ended = run.wait(timeout=WAIT)
    assert (ended.state, ended.items) == ("succeeded", 2000)


def test_an_error_of_the_users_own_generator_is_shown(client: Client, prefix: str) -> None:
    def source() -> Any:
        yield from (f"text {i}" for i in range(20))
        raise ValueError("my generator broke")

    run = client.map("text-classification", source(), output=prefix, shard_size=10)
    with pytest.raises(RunError, match="my generator broke"):
        run.wait(timeout=WAIT)
    run.cancel()
