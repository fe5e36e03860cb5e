"""fetch against a real S3 server: the bytes that were meant, or a code that says why not."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from pipefleet.contract import JobItem
from pipefleet.objects import ObjectStore
from pipefleet.storage import StorageRef
from pipefleet_workers.items import Blob, Fetched, ItemError, JobContext, Work
from pipefleet_workers.objects import WorkerStore
from pipefleet_workers.outcomes import Outcomes
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.stages.fetch import Fetcher, slices


@pytest.fixture
def uri(objects: ObjectStore) -> str:
    """A URI that nothing lies under."""
    return f"s3://pipefleet/fetch/{uuid.uuid4().hex}"


def work(inputs: Any) -> Work:
    return Work(JobContext("job", None, {}, 3, None, Outcomes(1)), 0, JobItem("0", inputs), {}, 1)


def fetch(inputs: Any, **settings: Any) -> Fetched:
    return Fetcher(WorkerStore(retries=1, retry_seconds=2.0), WorkerSettings(**settings)).fetch(work(inputs))


def refusal(reference: StorageRef, **settings: Any) -> str:
    with pytest.raises(ItemError) as caught:
        fetch(reference.to_json(), **settings)
    failure = caught.value.failure
    assert failure.stage == "fetch"
    assert reference.uri in failure.message
    return failure.code


def stored(objects: ObjectStore, uri: str, body: bytes) -> StorageRef:
    objects.put(uri, body, content_type="text/plain")
    found = objects.head(uri)
    assert found is not None
    return found


def test_every_reference_becomes_its_bytes(objects: ObjectStore, uri: str) -> None:
    first, second = stored(objects, f"{uri}/a.txt", b"first"), stored(objects, f"{uri}/b.txt", b"second")
    fetched = fetch({"text": first.to_json(), "more": ["inline", second.to_json()]})
    assert fetched.inputs == {
        "text": Blob(first.uri, b"first", "text/plain"),
        "more": ["inline", Blob(second.uri, b"second", "text/plain")],
    }
    assert fetched.work.seconds["fetch"] > 0


def test_a_bare_reference_needs_no_etag_and_no_size(objects: ObjectStore, uri: str) -> None:
    stored(objects, uri, b"bytes")
    assert fetch(StorageRef(uri).to_json()).inputs == Blob(uri, b"bytes", None)


def test_a_large_object_comes_whole(objects: ObjectStore, uri: str) -> None:
    body = bytes(range(256)) * (40 << 12)
    reference = stored(objects, uri, body)
    assert fetch(reference.to_json()).inputs.content == body


@pytest.mark.parametrize("suffix", ["/missing.txt", ""])
def test_a_missing_object_is_not_found(objects: ObjectStore, uri: str, suffix: str) -> None:
    assert refusal(StorageRef(uri + suffix)) == "not_found"


def test_a_missing_bucket_is_not_found(objects: ObjectStore) -> None:
    assert refusal(StorageRef("s3://no-such-bucket-here/key")) == "not_found"


def test_an_empty_object_is_told_whether_its_size_is_known_or_not(objects: ObjectStore, uri: str) -> None:
    reference = stored(objects, uri, b"")
    assert refusal(reference) == "empty_object"
    assert refusal(StorageRef(uri)) == "empty_object"


def test_an_object_that_changed_is_not_taken_for_the_one_that_was_meant(objects: ObjectStore, uri: str) -> None:
    before = stored(objects, uri, b"version one")
    after = stored(objects, uri, b"version two")
    assert refusal(before) == "changed"
    assert fetch(after.to_json()).inputs.content == b"version two"


def test_an_object_of_another_size_is_not_taken(objects: ObjectStore, uri: str) -> None:
    stored(objects, uri, b"seven b")
    assert refusal(StorageRef(uri, size=9)) == "truncated_media"


def test_an_object_above_the_bound_is_refused_by_its_reference_alone(objects: ObjectStore, uri: str) -> None:
    assert refusal(StorageRef(uri, size=101), max_object_bytes=100) == "too_large"  # there is no such object


def test_an_object_of_unknown_size_above_the_bound_is_refused(objects: ObjectStore, uri: str) -> None:
    stored(objects, uri, b"x" * 101)
    assert refusal(StorageRef(uri), max_object_bytes=100) == "too_large"
    assert fetch(StorageRef(uri).to_json(), max_object_bytes=101).inputs.content == b"x" * 101


def test_only_allowed_prefixes_are_read(objects: ObjectStore, uri: str) -> None:
    reference = stored(objects, uri, b"bytes")
    assert refusal(reference, allowed_uris="s3://media/, s3://pipefleet/other/") == "forbidden"
    assert fetch(reference.to_json(), allowed_uris="s3://media/, s3://pipefleet/fetch/").inputs.content == b"bytes"


def test_wrong_credentials_are_forbidden(objects: ObjectStore, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = stored(objects, uri, b"bytes")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert refusal(reference) == "forbidden"


def test_a_server_that_is_away_is_told_so(objects: ObjectStore, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert refusal(StorageRef(uri)) == "unavailable"


@pytest.mark.parametrize(
    "name", ["b\u00e4r \u4e16\u754c.txt", "with space.txt", "a+b=c&d@e,f;g:h.txt", "(1) it's!.txt", "dots.../x"]
)
def test_keys_of_any_letters(objects: ObjectStore, uri: str, name: str) -> None:
    reference = stored(objects, f"{uri}/{name}", name.encode())
    assert fetch(reference.to_json()).inputs.content == name.encode()


def test_slices_keep_order_and_lose_nothing() -> None:
    works = [work(str(index)) for index in range(7)]
    assert [list(one) for one in slices(works, 3)] == [works[:3], works[3:6], works[6:]]
    assert slices([], 3) == []
