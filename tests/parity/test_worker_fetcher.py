"""fetch against a real S3 server: the bytes that were meant, or a code that says why not."""

from __future__ import annotations

import tracemalloc
import uuid
from typing import Any

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.contract.references import StorageRef
from pipefleet.errors import ServiceUnavailableError
from pipefleet.storage.store import ObjectStore
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import Blob, Fetched, ItemError, JobContext, Work
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import WorkerStore
from pipefleet_workers.storage.uri_gate import lies_under


@pytest.fixture
def uri(objects: ObjectStore) -> str:
    """A URI that nothing lies under."""
    return f"s3://pipefleet/fetch/{uuid.uuid4().hex}"


def work(inputs: Any) -> Work:
    return Work(JobContext("job", None, {}, 3, None, Outcomes(range(1))), 0, JobItem("0", inputs), {}, 1)


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
    with pytest.raises(ServiceUnavailableError, match=r"does not answer|cannot reach S3"):
        fetch(StorageRef(uri).to_json())


KEYS = [
    "b\u00e4r \u4e16\u754c.txt",
    "with space.txt",
    "a+b=c&d@e,f;g:h.txt",
    "(1) it's!.txt",
    "dots.../x",
    "per%20cent%2F.txt",
    '~tilde#hash?question*star"quote<>[]{}|^`$.txt',
    "back\\slash.txt",
    "high\u0085control.txt",
    "a//b.txt",
    "tab\there.txt",
    "line\nend.txt",
    "delete\x7f.txt",
]


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_any_form(objects: ObjectStore, uri: str, name: str) -> None:
    reference = stored(objects, f"{uri}/{name}", name.encode())
    assert fetch(reference.to_json()).inputs.content == name.encode()


@pytest.mark.parametrize("name", KEYS)
def test_what_is_written_under_a_key_of_any_form_is_found_there(objects: ObjectStore, uri: str, name: str) -> None:
    store, key = WorkerStore(), f"{uri}/{name}"
    assert not store.exists(key)
    assert store.put_new(key, b"first", content_type="text/plain")
    assert not store.put_new(key, b"second", content_type="text/plain")
    assert store.exists(key)
    assert objects.get(key) == b"first"
    store.put(key, b"third", content_type="text/plain")
    assert objects.get(key) == b"third"


def test_a_key_that_begins_with_a_slash_is_another_than_the_one_without(objects: ObjectStore) -> None:
    name = uuid.uuid4().hex
    assert refusal(StorageRef(f"s3://pipefleet//{name}")) == "not_found"
    reference = stored(objects, f"s3://pipefleet//{name}", b"bytes")
    assert fetch(reference.to_json()).inputs.content == b"bytes"


@pytest.mark.parametrize("name", ["a//b.txt", "a.txt"])
def test_references_are_checked_whatever_the_form_of_the_key(objects: ObjectStore, uri: str, name: str) -> None:
    before = stored(objects, f"{uri}/{name}", b"version one")
    assert refusal(StorageRef(before.uri, size=9)) == "truncated_media"
    assert refusal(StorageRef(before.uri), max_object_bytes=10) == "too_large"
    stored(objects, before.uri, b"version two")
    assert refusal(before) == "changed"
    assert refusal(StorageRef(f"{uri}/missing/{name}")) == "not_found"


@pytest.mark.parametrize("key", ["", "a/../b.txt", "./b.txt", "..", "a/."])
def test_keys_that_no_object_can_have_are_refused(objects: ObjectStore, key: str) -> None:
    assert refusal(StorageRef(f"s3://pipefleet/{key}")) == "bad_input"


def test_a_server_that_is_away_is_told_so_for_keys_of_any_form(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(ServiceUnavailableError, match=r"does not answer|cannot reach S3"):
        fetch(StorageRef(f"{uri}/a//b.txt").to_json())


@pytest.mark.parametrize("name", ["a//b", "ab"])
def test_an_object_above_the_bound_is_not_loaded(objects: ObjectStore, uri: str, name: str) -> None:
    stored(objects, f"{uri}/{name}", bytes(50 << 20))
    tracemalloc.start()
    try:
        assert refusal(StorageRef(f"{uri}/{name}"), max_object_bytes=100) == "too_large"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 25 << 20


@pytest.mark.parametrize(
    ("uri", "prefixes", "allowed"),
    [
        ("s3://pipefleet/a", ["s3://"], True),
        ("s3://pipefleet/a", ["s3://pipefleet"], True),
        ("s3://pipefleet/a", ["s3://pipefleet/"], True),
        ("s3://pipefleet/a", ["s3://pipe"], False),
        ("s3://pipefleet/fetched/a", ["s3://pipefleet/fetch"], False),
        ("s3://pipefleet/fetch", ["s3://pipefleet/fetch"], True),
        ("s3://pipefleet/a", ["s3://other/", "s3://pipefleet/"], True),
        ("s3://pipefleet/a", [], False),
    ],
)
def test_prefixes_are_counted_by_whole_parts(uri: str, prefixes: list[str], allowed: bool) -> None:
    assert lies_under(uri, prefixes) is allowed


def test_an_allowed_bucket_does_not_allow_buckets_whose_name_begins_so(objects: ObjectStore, uri: str) -> None:
    reference = stored(objects, uri, b"bytes")
    assert refusal(reference, allowed_uris="s3://pipe") == "forbidden"
    assert fetch(reference.to_json(), allowed_uris="s3://pipefleet").inputs.content == b"bytes"
