"""What S3 refuses, by both clients: an outage is retried, a refused caller is told its cause, a refused object fails for good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipefleet.contract.messages import JobItem
from pipefleet.contract.references import StorageRef
from pipefleet.errors import (
    AccessDeniedError,
    ObjectMissingError,
    ObjectRefusedError,
    PipefleetError,
    ServiceUnavailableError,
)
from pipefleet.storage.store import ObjectStore, renew_credentials
from pipefleet_workers.consume.health import Health
from pipefleet_workers.consume.outcomes import Outcomes
from pipefleet_workers.consume.places import Places
from pipefleet_workers.inputs.fetch import Fetcher
from pipefleet_workers.items import ItemError, JobContext, Work
from pipefleet_workers.settings import WorkerSettings
from pipefleet_workers.storage.store import BarredError, RefusedHereError, WorkerStore
from tests.unit.s3_answers import Answers, answering

URI = "s3://bucket/key"
Call = Callable[[str], object]


PLAIN = ObjectStore()


@pytest.fixture(scope="module")
def server() -> Iterator[Answers]:
    with answering() as one:
        yield one


@pytest.fixture
def answers(server: Answers, monkeypatch: pytest.MonkeyPatch) -> Answers:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server.status, server.code, server.more, server.ahead = 403, "AccessDenied", "", 0.0
    server.asked.clear()
    return server


def calls(client: str, plain: ObjectStore = PLAIN) -> dict[str, Call]:
    if client == "boto3":
        plain.client.meta.events.register_first("needs-retry.s3", lambda **_: False, unique_id="once")
        return {"get": plain.get, "head": plain.head, "put": lambda uri: plain.put(uri, b"x")}
    store = WorkerStore(retries=0, retry_seconds=1.0)
    return {
        "get": lambda uri: store.get(StorageRef(uri)),
        "head": store.exists,
        "put": lambda uri: store.put(uri, b"x", content_type="text/plain"),
        "put_new": lambda uri: store.put_new(uri, b"x", content_type="text/plain"),
    }


@pytest.mark.parametrize("client", ["boto3", "obstore"])
@pytest.mark.parametrize(
    ("status", "code", "kind", "words"),
    [
        (403, "AccessDenied", AccessDeniedError, "what their policy allows"),
        (403, "InvalidAccessKeyId", AccessDeniedError, "nobody has this AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", AccessDeniedError, "AWS_SECRET_ACCESS_KEY does not belong"),
        (400, "ExpiredToken", AccessDeniedError, "AWS_SESSION_TOKEN has expired"),
        (400, "InvalidToken", AccessDeniedError, "AWS_SESSION_TOKEN is not valid"),
        (400, "AuthorizationHeaderMalformed", AccessDeniedError, "in another region: set AWS_REGION to eu-west-1"),
        (401, "Unauthorized", AccessDeniedError, "check the AWS_\\* credentials"),
        (400, "KeyTooLongError", ObjectRefusedError, "rename the object"),
        (400, "InvalidRequest", ObjectRefusedError, "InvalidRequest"),
        (400, "InvalidArgument", ObjectRefusedError, "InvalidArgument"),
        (400, "EntityTooLarge", ObjectRefusedError, "too large"),
        (400, "InvalidBucketName", ObjectRefusedError, "no bucket can have this name"),
        (403, "InvalidObjectState", ObjectRefusedError, "archived; restore it first"),
        (400, "KMS.DisabledException", ObjectRefusedError, "enable the key"),
        (501, "NotImplemented", ObjectRefusedError, "use another"),
        (404, "NoSuchBucket", ObjectMissingError, "no bucket|no object"),
        (503, "SlowDown", ServiceUnavailableError, ""),
        (507, "XMinioStorageFull", ServiceUnavailableError, ""),
        (403, "QuotaExceeded", ServiceUnavailableError, ""),
        (400, "RequestTimeout", ServiceUnavailableError, ""),
        (500, "InternalError", ServiceUnavailableError, ""),
        (409, "OperationAborted", ServiceUnavailableError, ""),
    ],
)
def test_an_answer_is_an_outage_a_refused_caller_or_a_refused_object(
    answers: Answers, client: str, status: int, code: str, kind: type[PipefleetError], words: str
) -> None:
    answers.status, answers.code, answers.more = status, code, "<Region>eu-west-1</Region>"
    for name, call in calls(client).items():
        if status in (404, 409) and name != "get":
            continue  # none is there, or another's write is on its way
        with pytest.raises(PipefleetError, match=words) as caught:
            call(URI)
        assert type(caught.value) is kind, name
        assert caught.value.retryable is (kind is ServiceUnavailableError)


def test_a_wrong_region_without_a_reason_is_named(answers: Answers) -> None:
    answers.status, answers.code = 301, "PermanentRedirect"
    with pytest.raises(AccessDeniedError, match="'bucket' is in another region: set AWS_REGION"):
        calls("obstore")["get"](URI)


@pytest.mark.parametrize("client", ["boto3", "obstore"])
@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "AccessDenied"])
@pytest.mark.parametrize(
    ("ahead", "words"),
    [
        (31_536_000.0, "365 days behind"),
        (10_800.0, "3 hours behind"),
        (3660.0, "61 minutes behind"),
        (-3660.0, "61 minutes ahead of"),
    ],
)
def test_a_clock_that_is_wrong_is_named_as_the_cause(
    answers: Answers, client: str, code: str, ahead: float, words: str
) -> None:
    answers.code, answers.ahead = code, ahead
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + ahead))
    answers.more = f"<ServerTime>{at}</ServerTime>"
    for name, call in calls(client).items():
        with pytest.raises(
            AccessDeniedError, match=f"the clock of this machine is {words} the store's; set it"
        ) as caught:
            call(URI)
        assert "credentials" not in str(caught.value), name


def test_how_far_the_clock_is_off_is_told_by_a_refusal_too(answers: Answers) -> None:
    answers.ahead = 90.0
    behind = ObjectStore().clock_behind(URI)
    assert behind == pytest.approx(90.0, abs=10.0)


@pytest.mark.parametrize(
    ("status", "code", "fails_with"), [(403, "AccessDenied", "forbidden"), (400, "KeyTooLongError", "bad_object")]
)
def test_an_item_fails_alone_for_an_object_that_is_refused(
    answers: Answers, status: int, code: str, fails_with: str
) -> None:
    answers.status, answers.code = status, code
    store = WorkerStore(retries=0, retry_seconds=1.0)
    store.report_refusals(on_denied=Health(lambda: None).accuse)
    with pytest.raises(ItemError) as caught:
        fetch(store)
    assert caught.value.failure.code == fails_with


def test_no_item_fails_for_a_worker_that_is_refused(answers: Answers) -> None:
    answers.code = "InvalidAccessKeyId"
    store = WorkerStore(retries=0, retry_seconds=1.0)
    quick = WorkerStore(retries=0, retry_seconds=1.0)
    health = Health(
        lambda: quick.put("s3://bucket/probe", b"x", content_type="text/plain"), sleep=threading.Event().wait
    )
    store.report_refusals(on_denied=health.accuse)
    with pytest.raises(BarredError, match="nobody has this AWS_ACCESS_KEY_ID"):
        fetch(store)
    for key in ("key", "a//key"):  # the second goes through the plain client
        with pytest.raises(BarredError):
            store.put(f"s3://bucket/{key}", b"x", content_type="text/plain")
    assert health.barred is not None


def fetch(store: WorkerStore) -> None:
    item = JobItem("0", StorageRef(URI).to_json())
    context = JobContext("job", None, {}, 3, None, Outcomes(()))
    Fetcher(store, WorkerSettings()).fetch(Work(context, 0, item, {}, 1))


def test_where_another_worker_may_be_allowed_no_item_fails_and_no_output(answers: Answers) -> None:
    store = WorkerStore(retries=0, retry_seconds=1.0)
    store.report_refusals(on_refused=Places(lambda bucket: bucket == "bucket").require)
    with pytest.raises(RefusedHereError, match="'bucket'"):
        fetch(store)
    for key in ("key", "a//key"):
        with pytest.raises(RefusedHereError):
            store.put(f"s3://bucket/{key}", b"x", content_type="text/plain")
        with pytest.raises(AccessDeniedError):
            store.put(f"s3://foreign/{key}", b"x", content_type="text/plain")


def test_an_object_that_is_refused_in_a_bucket_that_is_read_is_nobodys_else(answers: Answers) -> None:
    asked: list[str] = []
    store = WorkerStore(retries=0, retry_seconds=1.0)
    store.report_refusals(on_refused=asked.append)
    answers.allowed = {"/bucket/good"}
    assert store.get(StorageRef("s3://bucket/good"))
    with pytest.raises(ItemError) as caught:
        fetch(store)
    assert (caught.value.failure.code, asked) == ("forbidden", [])
    answers.allowed = set()
    with pytest.raises(ItemError):
        fetch(store)
    assert asked == ["bucket"], "the bucket is read no more"


def test_the_words_of_a_key_are_no_answer(answers: Answers) -> None:
    answers.status, answers.code = 503, "SlowDown"
    with pytest.raises(ServiceUnavailableError):
        calls("obstore")["get"]("s3://bucket/status code: 403 <Code>InvalidAccessKeyId</Code>")


@pytest.mark.parametrize("client", ["boto3", "obstore"])
def test_without_credentials_both_clients_say_so(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, client: str
) -> None:
    without_keys(monkeypatch, tmp_path)
    with pytest.raises(AccessDeniedError, match="no S3 credentials: set AWS_ACCESS_KEY_ID"):
        calls(client, ObjectStore())["get"](URI)
    assert not answers.asked


def without_keys(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Take the credentials out of the environment; the file in which both clients look for them then."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    return folder / "credentials"


@pytest.mark.parametrize("client", ["boto3", "obstore"])
def test_credentials_of_a_file_are_read_again_when_they_are_renewed(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str, client: str
) -> None:
    right = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    file = without_keys(monkeypatch, tmp_path)
    put = calls(client, ObjectStore())["put"]
    write_keys(file, "nobody", "wrong")
    with pytest.raises(AccessDeniedError):
        put(f"{prefix}key")
    write_keys(file, *right)
    renew_credentials()
    put(f"{prefix}key")


def write_keys(file: Path, key: str, secret: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
