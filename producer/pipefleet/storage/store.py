"""The producer's object store: S3 through boto3. Only this module maps botocore's errors.

URIs and bytes come in and go out. Jobs, runs and inputs call `ObjectStore`. It is thread-safe, as boto3 clients are, and opens
no connection before its first call. It raises errors of `pipefleet.errors`.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from pipefleet.contract.references import StorageRef, split_uri
from pipefleet.errors import (
    AccessDeniedError,
    ObjectRefusedError,
    PipefleetError,
    RunError,
    ServiceUnavailableError,
    UsageError,
)
from pipefleet.forking import renew_after_fork
from pipefleet.patience import pause
from pipefleet.storage.s3_errors import NO_CREDENTIALS, Answer, endpoint, error_of, server_time

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from types_boto3_s3.client import S3Client

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 60.0
"""Seconds. Long, because the losers of a race of conditional writes may wait for the winner's lock."""
CONFLICT_RETRIES = 8
"""Tries of a conditional write. AWS answers 409 to conditional writes that overlap, and asks to try again."""
WRITER = "pipefleet-writer"
"""The metadata field that names the writer of an object that was written conditionally."""


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One object of a listing: `size` in bytes, `etag` without quotes."""

    key: str
    size: int
    etag: str


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Turn boto3's errors inside of the block into errors of this package, which name `uri`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise map_s3_error(error, uri) from None


def map_s3_error(error: Exception, uri: str) -> PipefleetError:
    """The error of this package for an error of botocore's about `uri`."""
    from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDeniedError(NO_CREDENTIALS)
    if isinstance(error, ClientError):
        return error_of(_answer(error), uri)
    if isinstance(error, ParamValidationError):
        return ObjectRefusedError(f"{uri} names no bucket or key that S3 can have; rename it")
    if type(error).__name__ in _NO_CREDENTIALS:
        return error_of(Answer(403, "CredentialRetrievalError"), uri)
    return ServiceUnavailableError(
        f"cannot reach S3 at {endpoint()} ({type(error).__name__}); start a server with `pipefleet up`, "
        "or set AWS_ENDPOINT_URL_S3"
    )


_NO_CREDENTIALS = {
    "ConfigNotFound", "ConfigParseError", "CredentialRetrievalError", "InvalidConfigError", "MetadataRetrievalError",
    "NoAuthTokenError", "ProfileNotFound", "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError",
    "UnknownCredentialError",
}  # fmt: skip
"""Errors of botocore's that say that the source of credentials is wrong or away."""


def _answer(error: ClientError) -> Answer:
    said: Any = error.response.get("Error", {})
    headers: Any = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = said.get("Region") or headers.get("x-amz-bucket-region") or ""
    return Answer(
        _status(error), str(said.get("Code", "")), str(region), _behind(headers, str(said.get("ServerTime", "")))
    )


def _behind(headers: Any, server: str = "") -> float | None:
    """Seconds that this machine's clock is behind the clock of the server that has just answered."""
    at = server_time(headers, f"<ServerTime>{server}</ServerTime>" if server else "")
    return None if at is None else at - time.time()


def _status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _check_size(uri: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise RunError(f"{uri} has {size} bytes, above the bound of {most}: it is no file of a run; remove it")


_renewals = 0


def renew_credentials() -> None:
    """Let every store of this process read its credentials anew at its next call, from the environment, a file or a role."""
    global _renewals
    _renewals += 1


def renewals() -> int:
    """How often `renew_credentials` was called."""
    return _renewals


def _connect() -> S3Client:
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        retries={"mode": "standard", "max_attempts": 4},
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    try:
        # boto3.client would use the process's one session, which keeps the first credentials that it saw.
        return boto3.session.Session().client("s3", config=config, region_name=region)
    except ValueError:
        raise UsageError("AWS_ENDPOINT_URL_S3 is no URL: it must be like http://host:port") from None


class ObjectStore:
    """Reads, writes and lists objects by `s3://` URI, with the credentials of the environment at its first call.

    All methods raise ServiceUnavailableError, AccessDeniedError, ObjectRefusedError or ObjectMissingError; UsageError where the
    environment names no usable endpoint.
    """

    def __init__(self) -> None:
        self._client: S3Client | None = None
        self._of = renewals()
        self._parents: S3Client | None = None
        self._lock = threading.Lock()
        renew_after_fork(self)

    @property
    def client(self) -> S3Client:
        """The boto3 client, for calls that this class does not offer."""
        client = self._client
        if client is None or self._of != renewals():
            with self._lock:
                if self._client is None or self._of != renewals():
                    self._of = renewals()
                    self._client = _connect()
                client = self._client
        return client

    def after_fork(self) -> None:
        """A forked process opens its own connections. It does not close the parent's: threads there may have held their locks."""
        self._parents = self._client
        self._client, self._lock = None, threading.Lock()

    def put(self, uri: str, body: bytes, *, content_type: str = "application/json") -> None:
        """Write an object, and replace an object that is there."""
        bucket, key = split_uri(uri)
        with s3_errors(uri):
            self.client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type)

    def put_new(
        self, uri: str, body: bytes, *, content_type: str = "application/json", writer: str | None = None
    ) -> bool:
        """Write an object unless there is one already, atomically. True if this call wrote it.

        The object is marked with its writer. So a write that boto3 sent again after a lost answer is known as our own. With
        `writer` (at most 100 ASCII characters) a second call by the same writer returns True too.
        """
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        writer = writer or uuid.uuid4().hex
        request: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": body, "ContentType": content_type}
        request |= {"IfNoneMatch": "*", "Metadata": {WRITER: writer}}
        with s3_errors(uri):
            for attempt in range(CONFLICT_RETRIES):
                try:
                    self.client.put_object(**request)
                    return True
                except ClientError as error:
                    if _status(error) == 412:
                        return self._writer_of(uri) == writer
                    if _status(error) != 409 or attempt == CONFLICT_RETRIES - 1:
                        raise
                time.sleep(pause(attempt, first=0.05, longest=2.0))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def writer(self, uri: str) -> str | None:
        """The writer that `put_new` marked an object with; None where there is no object, or no mark."""
        with s3_errors(uri):
            return self._writer_of(uri)

    def _writer_of(self, uri: str) -> str | None:
        found = self._head(uri)
        return None if found is None else found["Metadata"].get(WRITER)

    def upload(self, uri: str, file: IO[bytes], *, content_type: str) -> None:
        """Write a file of any size. boto3 sends a large file in parts."""
        bucket, key = split_uri(uri)
        with s3_errors(uri):
            self.client.upload_fileobj(file, bucket, key, ExtraArgs={"ContentType": content_type})

    def get(self, uri: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object. Raises RunError, before it reads, for an object of more than `max_bytes`."""
        bucket, key = split_uri(uri)
        with s3_errors(uri):
            found = self.client.get_object(Bucket=bucket, Key=key)
            with closing(found["Body"]) as body:
                _check_size(uri, found["ContentLength"], max_bytes)
                return body.read()

    def start(self, uri: str, size: int) -> bytes:
        """The first `size` bytes of an object that is not empty; all bytes of a shorter object."""
        bucket, key = split_uri(uri)
        with s3_errors(uri):
            return self.client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")["Body"].read()

    def head(self, uri: str) -> StorageRef | None:
        """Size, ETag and type of an object; None where there is none."""
        with s3_errors(uri):
            found = self._head(uri)
        if found is None:
            return None
        return StorageRef(uri, found["ETag"].strip('"'), found["ContentLength"], found.get("ContentType"))

    def _head(self, uri: str) -> Any:
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        try:
            return self.client.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if _status(error) == 404:
                return None
            if _answer(error).is_vague:  # the answer to a HEAD has no body and gives no reason; a GET does
                self.client.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")["Body"].close()
            raise

    def require_bucket(self, uri: str) -> None:
        """Raise ObjectMissingError, naming the bucket, unless the bucket of `uri` exists."""
        from botocore.exceptions import ClientError

        bucket, _ = split_uri(uri)
        with s3_errors(uri):
            try:
                self.client.head_bucket(Bucket=bucket)
            except ClientError as error:
                if _status(error) == 404:
                    raise error_of(Answer(404, "NoSuchBucket"), uri) from None
                if _answer(error).is_vague:  # the answer to a HEAD has no body and gives no reason; a listing does
                    self.client.list_objects_v2(Bucket=bucket, MaxKeys=1)
                raise

    def clock_behind(self, uri: str) -> float | None:
        """Seconds that this machine's clock is behind the store's, to the second; None where the server tells no time.

        An answer that refuses access tells the time too.
        """
        from botocore.exceptions import ClientError

        bucket, _ = split_uri(uri)
        with s3_errors(uri):
            try:
                answer: Any = self.client.head_bucket(Bucket=bucket)
            except ClientError as error:
                answer = error.response
        return _behind(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}))

    def list(self, uri: str, *, after: str = "") -> Iterator[ListedObject]:
        """Objects under a prefix with keys above `after`, sorted by key. One page is in memory at a time."""
        bucket, prefix = split_uri(uri)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        if after:
            request["StartAfter"] = after
        while True:
            with s3_errors(uri):
                page = self._page(request)
            for entry in page.get("Contents", []):
                yield ListedObject(entry["Key"], entry["Size"], entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _page(self, request: dict[str, Any]) -> Any:
        return self.client.list_objects_v2(**request)

    def lines(self, uri: str, *, etag: str | None = None, max_bytes: int | None = None) -> Iterator[bytes]:
        """The lines of an object, streamed, without line ends. `etag` pins a version.

        Raises ObjectChangedError when the object has another version, RunError when it has more than `max_bytes`.
        """
        bucket, key = split_uri(uri)
        pinned: dict[str, Any] = {"IfMatch": etag} if etag else {}
        with s3_errors(uri):
            found = self.client.get_object(Bucket=bucket, Key=key, **pinned)
        body = found["Body"]
        try:
            _check_size(uri, found["ContentLength"], max_bytes)
        except RunError:
            body.close()
            raise
        chunks, left = body.iter_chunks(1 << 16), b""
        while True:
            with s3_errors(uri):  # around a chunk: around each line it would take longer than the line
                chunk = next(chunks, b"")
            *lines, left = (left + chunk).splitlines(keepends=True) or [b""]
            yield from (line.splitlines()[0] for line in lines)
            if not chunk:
                yield from left.splitlines()
                return

    def chunks(self, uri: str, size: int = 1 << 16) -> Iterator[bytes]:
        """The bytes of an object, streamed, at most `size` at a time."""
        bucket, key = split_uri(uri)
        with s3_errors(uri):
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"]
        with closing(body):
            while True:
                with s3_errors(uri):
                    chunk = body.read(size)
                if not chunk:
                    return
                yield chunk

    def delete(self, uri: str) -> None:
        """Remove an object. A missing object is no error."""
        bucket, key = split_uri(uri)
        with s3_errors(uri):
            self.client.delete_object(Bucket=bucket, Key=key)
