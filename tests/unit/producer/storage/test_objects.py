"""Object storage and Redis as the producer sees them fail: every foreign error becomes one of ours, without secrets."""

from __future__ import annotations

import io
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import botocore.exceptions
import pytest
from redis import Redis, exceptions

from pipefleet.client import Client
from pipefleet.connection.errors import redis_errors
from pipefleet.contract.messages import Priority
from pipefleet.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectRefusedError,
    PipefleetError,
    ServiceUnavailableError,
    SourceError,
    UsageError,
)
from pipefleet.settings import Settings, load_settings, without_credentials
from pipefleet.storage.store import ObjectStore, map_s3_error

SECRET = "hunter2-secret"
SCRIPT = "Error running script (call to f_a631): @user_script:1: @user_script:"
OF_CLUSTERS = ("ClusterDownError", "AskError", "MovedError", "TryAgainError", "ClusterCrossSlotError")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, held until the test ends."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class TestStore:
    def test_what_is_written_is_read(self, store: ObjectStore, prefix: str) -> None:
        uri = prefix + "a/ü b?c#d.json"
        assert store.head(uri) is None
        store.put(uri, b"1\n22\r\n\n333", content_type="text/plain")
        found = store.head(uri)
        assert found is not None
        assert (found.size, found.type) == (10, "text/plain")
        assert found.etag
        assert '"' not in found.etag
        assert store.get(uri) == b"1\n22\r\n\n333"
        assert list(store.lines(uri, etag=found.etag)) == [b"1", b"22", b"", b"333"]
        store.delete(uri)
        store.delete(uri)
        assert store.head(uri) is None

    def test_of_many_that_write_at_once_exactly_one_does(self, store: ObjectStore, prefix: str) -> None:
        for number in range(5):
            uri = f"{prefix}{number}"
            with ThreadPoolExecutor(8) as threads:
                bodies = [bytes([writer]) * 1000 for writer in range(8)]
                won = list(threads.map(lambda body, uri=uri: store.put_new(uri, body), bodies))
            assert sum(won) == 1
            assert store.get(uri) == bodies[won.index(True)]

    def test_a_write_whose_answer_was_lost_is_known_as_our_own(
        self, store: ObjectStore, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = store.client.put_object
        with monkeypatch.context() as patch:  # as botocore does when the connection breaks after the write
            patch.setattr(store.client, "put_object", lambda **request: whole(**request) and whole(**request))
            assert store.put_new(prefix + "a", b"1")
        assert not store.put_new(prefix + "a", b"1")  # the same bytes, but another's
        assert store.put_new(prefix + "b", b"1", writer="we")
        assert store.put_new(prefix + "b", b"1", writer="we")
        assert not store.put_new(prefix + "b", b"1", writer="others")
        assert store.get(prefix + "b") == b"1"

    def test_writes_that_overlap_are_tried_again_after_a_pause(
        self, store: ObjectStore, prefix: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole, pauses = store.client.put_object, []

        def conflict(**request: Any) -> Any:
            if len(pauses) < 3:
                response: Any = {"ResponseMetadata": {"HTTPStatusCode": 409}}
                raise botocore.exceptions.ClientError(response, "PutObject")
            return whole(**request)

        monkeypatch.setattr(store.client, "put_object", conflict)
        mine, sleep = threading.get_ident(), time.sleep
        # Threads of other tests may sleep at the same time.
        monkeypatch.setattr("time.sleep", lambda s: pauses.append(s) if threading.get_ident() == mine else sleep(s))
        assert store.put_new(prefix + "a", b"1")
        assert len(set(pauses)) == 3
        assert all(0 < one <= 2 for one in pauses)

    def test_each_store_reads_the_environment_anew(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        assert store.head("s3://pipefleet/none") is None
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        with pytest.raises(AccessDeniedError):
            ObjectStore().head("s3://pipefleet/none")

    def test_an_endpoint_without_a_scheme_is_refused(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"user:{SECRET}@localhost:8333")
        with pytest.raises(UsageError, match="must be like http://host:port") as caught:
            ObjectStore().get("s3://pipefleet/a")
        assert SECRET not in str(caught.value)

    def test_a_large_file_is_uploaded(self, store: ObjectStore, prefix: str) -> None:
        body = bytes(range(256)) * 40_000
        store.upload(prefix + "large", io.BytesIO(body), content_type="application/x-ndjson")
        assert store.get(prefix + "large") == body

    def test_a_listing_starts_after_a_key(self, store: ObjectStore, prefix: str) -> None:
        for name in "abc":
            store.put(prefix + name, b"")
        every = list(store.list(prefix))
        assert [entry.key[-1] for entry in every] == ["a", "b", "c"]
        assert list(store.list(prefix, after=every[0].key)) == every[1:]


CALLS: dict[str, Callable[[ObjectStore, str], Any]] = {
    "put": lambda store, uri: store.put(uri, b""),
    "put_new": lambda store, uri: store.put_new(uri, b""),
    "upload": lambda store, uri: store.upload(uri, io.BytesIO(b"x"), content_type="text/plain"),
    "get": lambda store, uri: store.get(uri),
    "head": lambda store, uri: store.head(uri),
    "list": lambda store, uri: list(store.list(uri)),
    "lines": lambda store, uri: list(store.lines(uri)),
    "delete": lambda store, uri: store.delete(uri),
    "require_bucket": lambda store, uri: store.require_bucket(uri),
}


class TestS3Failing:
    @pytest.mark.parametrize("call", CALLS)
    def test_an_unreachable_server_is_named_without_credentials(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, closed_port: int, call: str
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:{SECRET}@127.0.0.1:{closed_port}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
        with pytest.raises(ServiceUnavailableError) as caught:
            CALLS[call](ObjectStore(), "s3://pipefleet/a")
        assert f"http://127.0.0.1:{closed_port}" in str(caught.value)
        assert "AWS_ENDPOINT_URL_S3" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert caught.value.__cause__ is None

    @pytest.mark.parametrize("call", sorted(set(CALLS) - {"head"}))
    def test_a_missing_bucket_is_said_to_be_missing(
        self, store: ObjectStore, environment: dict[str, str], call: str
    ) -> None:
        with pytest.raises(ObjectMissingError, match="bucket") as caught:
            CALLS[call](store, "s3://no-such-bucket/a")
        assert environment["AWS_ENDPOINT_URL_S3"] in str(caught.value)

    @pytest.mark.parametrize("call", ["get", "lines"])
    def test_a_missing_object_is_an_error_of_the_source(self, store: ObjectStore, prefix: str, call: str) -> None:
        with pytest.raises(ObjectMissingError, match=f"there is no object {prefix}none, or no such bucket, at http://"):
            CALLS[call](store, prefix + "none")

    @pytest.mark.parametrize("call", CALLS)
    def test_wrong_keys_are_refused_without_being_shown(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        with pytest.raises(AccessDeniedError, match=r"refuses access \(\w+\); check the AWS_\* credentials") as caught:
            CALLS[call](ObjectStore(), "s3://pipefleet/a")
        assert environment["AWS_ENDPOINT_URL_S3"] in str(caught.value)
        assert SECRET not in str(caught.value)
        assert environment["AWS_ACCESS_KEY_ID"] not in str(caught.value)

    def test_no_keys_at_all_says_which_to_set(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
        with pytest.raises(AccessDeniedError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            ObjectStore().get("s3://pipefleet/a")

    def test_an_object_that_changed_is_not_read_as_the_pinned_one(self, store: ObjectStore, prefix: str) -> None:
        store.put(prefix + "a", b"old")
        etag = store.head(prefix + "a").etag  # type: ignore[union-attr]
        store.put(prefix + "a", b"new")
        with pytest.raises(ObjectChangedError, match=f"{prefix}a was changed") as caught:
            list(store.lines(prefix + "a", etag=etag))
        assert not caught.value.retryable

    def test_every_error_of_botocore_becomes_one_of_ours(self) -> None:
        kinds = [
            kind
            for kind in vars(botocore.exceptions).values()
            if isinstance(kind, type) and issubclass(kind, botocore.exceptions.BotoCoreError)
        ]
        assert len(kinds) > 50
        for kind in kinds:
            error = kind.__new__(kind)
            expected = ServiceUnavailableError | AccessDeniedError | ObjectRefusedError
            assert isinstance(map_s3_error(error, "s3://b/a"), expected), kind

    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (404, "NoSuchBucket", ObjectMissingError),
            (404, "NoSuchKey", ObjectMissingError),
            (412, "PreconditionFailed", ObjectChangedError),
            (403, "AccessDenied", AccessDeniedError),
            (401, "InvalidAccessKeyId", AccessDeniedError),
            (500, "InternalError", ServiceUnavailableError),
            (503, "SlowDown", ServiceUnavailableError),
        ],
    )
    def test_a_status_decides_the_kind_of_error(self, status: int, code: str, kind: type[PipefleetError]) -> None:
        response: Any = {"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": {"HTTPStatusCode": status}}
        mapped = map_s3_error(botocore.exceptions.ClientError(response, "GetObject"), "s3://b-1/a")
        assert type(mapped) is kind
        assert mapped.exit_code == (3 if kind is ServiceUnavailableError else 2)
        assert isinstance(mapped, SourceError) == (mapped.exit_code == 2)
        assert SECRET not in str(mapped)


COMMANDS: dict[str, Callable[[Client], Any]] = {
    "submit": lambda client: client.submit("text-classification", "good"),
    "submit once": lambda client: client.submit("text-classification", "good", idempotency_key="k"),
    "status": lambda client: client.job("x").status(),
    "result": lambda client: client.job("x").result(1),
    "cancel": lambda client: client.job("x").cancel(),
    "publish": lambda client: client.publish([], "q", Priority.LOW) or client.submit("text-classification", "x"),
    "map": lambda client: client.map(
        "text-classification", ["good"], output=f"s3://pipefleet/tests/{uuid.uuid4().hex}/"
    ),
}


class TestRedisFailing:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_an_unreachable_server_is_named_without_its_password(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, closed_port: int, command: str
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", f"redis://user:{SECRET}@127.0.0.1:{closed_port}/3")
        with _impatient(Client()) as client, pytest.raises(ServiceUnavailableError) as caught:
            COMMANDS[command](client)
        assert f"redis://127.0.0.1:{closed_port}/3" in str(caught.value)
        assert SECRET not in str(caught.value)
        assert caught.value.exit_code == 3

    @pytest.mark.parametrize("command", COMMANDS)
    def test_a_wrong_password_is_refused_without_being_shown(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, command: str
    ) -> None:
        right = environment["PIPEFLEET_REDIS_URL"]
        wrong = f"redis://:{SECRET}@{right.split('@')[1]}"
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", wrong)
        with _impatient(Client()) as client, pytest.raises(ServiceUnavailableError, match="refuses access") as caught:
            COMMANDS[command](client)
        assert without_credentials(right) in str(caught.value)
        assert "check the password in PIPEFLEET_REDIS_URL" in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_every_error_of_redis_becomes_one_of_ours(self) -> None:
        kinds = [kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception)]
        assert len(kinds) > 20
        for kind in [*kinds, OSError, ConnectionResetError, TimeoutError]:
            if issubclass(kind, exceptions.RedisError | OSError):
                refused = UsageError if kind.__name__ in OF_CLUSTERS else ServiceUnavailableError
                with (
                    pytest.raises(refused, match=r"redis://h:1/0"),
                    redis_errors(f"redis://:{SECRET}@h:1/0"),
                ):
                    raise kind.__new__(kind)

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (exceptions.OutOfMemoryError(f"OOM {SECRET}"), "is out of memory"),
            (exceptions.ReadOnlyError("READONLY"), "is a replica"),
            (exceptions.BusyLoadingError("LOADING"), "is still loading"),
            (exceptions.MasterDownError("Link with MASTER is down"), "lost its primary"),
            (exceptions.ResponseError("MISCONF Redis is configured to save"), "cannot save its data"),
            (exceptions.ResponseError("NOREPLICAS Not enough good replicas"), "too few replicas"),
            (exceptions.ResponseError("BUSY Redis is busy running a script"), "is busy with a script"),
            (exceptions.ResponseError("Command # 2 (SET -OOM x) of pipeline caused error: MISCONF x"), "cannot save"),
            (exceptions.ResponseError(f"{SCRIPT} 1: -OOM command not allowed"), "is out of memory"),
            (exceptions.ResponseError(f"{SCRIPT} 1: -READONLY You can't write"), "is a replica"),
            (exceptions.ResponseError("Command # 1 (SET OOM x) of pipeline caused error: ERR"), "(ResponseError)"),
            (exceptions.ResponseError(f"ERR {SECRET}"), "answered with an error (ResponseError)"),
            (exceptions.ConnectionError("refused"), "cannot reach"),
            (exceptions.TimeoutError("slow"), "cannot reach"),
        ],
    )
    def test_what_redis_answers_is_not_taken_for_silence(self, error: Exception, words: str) -> None:
        with pytest.raises(ServiceUnavailableError) as caught, redis_errors("redis://h"):
            raise error
        assert words in str(caught.value)
        assert SECRET not in str(caught.value)

    def test_a_submit_says_at_once_that_redis_is_away(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, closed_port: int
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", f"redis://127.0.0.1:{closed_port}")
        with Client() as client:
            monkeypatch.setattr(client.watcher._ready, "wait", lambda _: pytest.fail("waits for what cannot come"))
            with pytest.raises(ServiceUnavailableError, match="cannot reach"):
                client.submit("text-classification", "x")

    def test_other_errors_pass(self) -> None:
        with pytest.raises(ZeroDivisionError), redis_errors("redis://h"):
            raise ZeroDivisionError

    def test_a_right_that_is_missing_is_not_taken_for_an_outage(
        self, client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        redis.execute_command("ACL", "SETUSER", "limited", "on", f">{SECRET}", "~*", "&*", "+ping")
        host = client.settings.redis_url.split("@")[1]
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", f"redis://limited:{SECRET}@{host}")
        with Client() as limited, pytest.raises(ServiceUnavailableError, match=r"refuses access \(NoPermissionError\)"):
            limited.job("x").status()


def _impatient(client: Client) -> Client:
    """A client that does not wait for its watcher to be connected first: here it never will be."""
    client.watcher._ready.set()
    return client


class TestSettings:
    def test_a_wrong_variable_is_named_without_its_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", f"http://:{SECRET}@host")
        monkeypatch.setenv("PIPEFLEET_STORE", "/tmp/store")
        monkeypatch.setenv("PIPEFLEET_IN_FLIGHT", "0")
        with pytest.raises(UsageError) as caught:
            load_settings()
        message = str(caught.value)
        assert "PIPEFLEET_REDIS_URL: must start with redis://, rediss:// or unix://" in message
        assert "PIPEFLEET_STORE: not an s3:// URI" in message
        assert "PIPEFLEET_IN_FLIGHT: " in message
        assert SECRET not in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "url",
        [
            "redis://:pw@host:port/0", f"redis://:{SECRET}/more@host:6379/0", f"redis://:{SECRET}#x@host:6379/0",
            f"redis://:{SECRET}?x@host/0", f"redis://:12?{SECRET}@host/0", "redis://host:99999", "redis://[::1/0",
            f"redis://host?socket_timeout={SECRET}",
        ],
    )  # fmt: skip
    def test_a_malformed_redis_url_is_refused_without_being_shown(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, url: str
    ) -> None:
        monkeypatch.setenv("PIPEFLEET_REDIS_URL", url)
        with pytest.raises(UsageError, match="PIPEFLEET_REDIS_URL") as caught:
            Client()
        assert SECRET not in str(caught.value)
        assert SECRET not in without_credentials(url)

    def test_settings_that_are_passed_do_not_show_the_password_either(self) -> None:
        with pytest.raises(ValueError, match="must start with") as caught:
            Settings(redis_url=f"http://:{SECRET}@h")  # type: ignore[call-arg]
        assert SECRET not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://user:pw@host:6379/0", "redis://host:6379/0"),
            ("rediss://:p%40w@host/1?password=pw&ssl_cert_reqs=none", "rediss://host/1"),
            ("redis://[::1]:6379", "redis://[::1]:6379"),
            ("unix://user:pw@/run/redis.sock?db=1", "unix:///run/redis.sock"),
            ("https://key:pw@s3.example.org/base", "https://s3.example.org/base"),
            ("redis://:12/34@host:6379/0", "redis://…"),
            ("redis://host/0?password=a@b", "redis://…"),
            ("redis://:pw@host:port/0", "redis://…"),
            ("host:6379", "…"),
        ],
    )
    def test_a_url_is_shown_without_user_and_password(self, url: str, shown: str) -> None:
        assert without_credentials(url) == shown

    def test_a_fleet_file_here_is_found_without_being_named(
        self, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        monkeypatch.delenv("PIPEFLEET_FLEET")
        assert load_settings().fleet_path is None
        (tmp_path / "fleet.toml").touch()
        assert load_settings().fleet_path is not None
