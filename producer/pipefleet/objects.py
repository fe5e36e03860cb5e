"""The producer's object store: S3 through boto3. Every botocore error is mapped here, and nowhere else.

An `ObjectStore` is thread-safe (boto3 clients are); it opens no connection before its first call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar

from pipefleet.errors import PipefleetError, ServiceUnavailableError, SourceError
from pipefleet.settings import without_credentials
from pipefleet.storage import StorageRef, split_uri

if TYPE_CHECKING:
    from types_boto3_s3.client import S3Client

_P = ParamSpec("_P")
_T = TypeVar("_T")

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 60.0
"""Seconds. Long, because the losers of a conditional-write race may wait for the winner's lock."""
CONFLICT_RETRIES = 8
"""AWS answers 409 to conditional writes that overlap and asks to try again."""


class ObjectMissingError(SourceError):
    """There is no such bucket or object."""

    code = "not_found"


class AccessDeniedError(SourceError):
    """The credentials do not allow this."""

    code = "forbidden"


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One object of a listing: `size` in bytes, `etag` without quotes."""

    key: str
    size: int
    etag: str


def _mapped(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turn what boto3 raises into this package's errors."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return method(*args, **kwargs)
        except (ClientError, BotoCoreError) as error:
            raise map_s3_error(error) from None

    return call


def map_s3_error(error: Exception) -> PipefleetError:
    """The error of this package for one of botocore's."""
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDeniedError(
            "no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or source the file that "
            "`pipefleet up --env-file` writes"
        )
    if not isinstance(error, ClientError):
        return ServiceUnavailableError(
            f"cannot reach S3 at {endpoint()} ({type(error).__name__}); start a server with `pipefleet up`, "
            "or set AWS_ENDPOINT_URL_S3"
        )
    detail = error.response.get("Error", {})
    code, status = detail.get("Code", ""), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return ObjectMissingError(f"there is no bucket {detail.get('BucketName') or 'of this name'} at {endpoint()}")
    if code in ("NoSuchKey", "NotFound", "404"):
        return ObjectMissingError(f"no such object or bucket at {endpoint()}")
    if status in (401, 403):
        return AccessDeniedError(f"S3 at {endpoint()} refuses access ({code}); check the AWS_* credentials")
    return ServiceUnavailableError(f"S3 at {endpoint()} failed with {status} {code}; try again later")


def endpoint() -> str:
    """The URL of the object store in use, without credentials."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return without_credentials(url) if url else "AWS"


class ObjectStore:
    """Reads, writes and lists objects by `s3://` URI.

    All methods raise ServiceUnavailableError, AccessDeniedError or ObjectMissingError.
    """

    @functools.cached_property
    def client(self) -> S3Client:
        """The boto3 client, for what this class does not offer."""
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
        return boto3.client("s3", config=config, region_name=region)

    @_mapped
    def put(self, uri: str, body: bytes, *, content_type: str = "application/json") -> None:
        """Write an object, replacing one that is there."""
        bucket, key = split_uri(uri)
        self.client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type)

    @_mapped
    def put_new(self, uri: str, body: bytes, *, content_type: str = "application/json") -> bool:
        """Write an object unless there is one already, atomically. True if this call wrote it."""
        from botocore.exceptions import ClientError

        bucket, key = split_uri(uri)
        for attempt in range(CONFLICT_RETRIES):
            try:
                self.client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type, IfNoneMatch="*")
                return True
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if status == 412:
                    return False
                if status != 409 or attempt == CONFLICT_RETRIES - 1:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    @_mapped
    def upload(self, uri: str, file: IO[bytes], *, content_type: str) -> None:
        """Write a file of any size, in parts where it is large."""
        bucket, key = split_uri(uri)
        self.client.upload_fileobj(file, bucket, key, ExtraArgs={"ContentType": content_type})

    @_mapped
    def get(self, uri: str) -> bytes:
        """The whole object."""
        bucket, key = split_uri(uri)
        return self.client.get_object(Bucket=bucket, Key=key)["Body"].read()

    @_mapped
    def head(self, uri: str) -> StorageRef | None:
        """Size, ETag and type of an object; None where there is none."""
        try:
            bucket, key = split_uri(uri)
            found = self.client.head_object(Bucket=bucket, Key=key)
        except self.client.exceptions.ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                return None
            raise
        return StorageRef(uri, found["ETag"].strip('"'), found["ContentLength"], found.get("ContentType"))

    @_mapped
    def require_bucket(self, uri: str) -> None:
        """Raise ObjectMissingError, naming the bucket, unless the bucket of `uri` exists."""
        bucket, _ = split_uri(uri)
        try:
            self.client.head_bucket(Bucket=bucket)
        except self.client.exceptions.ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:
                raise ObjectMissingError(f"there is no bucket {bucket!r} at {endpoint()}; create it first") from None
            raise

    def list(self, uri: str, *, after: str = "") -> Iterator[ListedObject]:
        """Objects under a prefix, sorted by key, a page in memory at a time; only keys above `after`."""
        bucket, prefix = split_uri(uri)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        if after:
            request["StartAfter"] = after
        while True:
            page = self._page(request)
            for entry in page.get("Contents", []):
                yield ListedObject(entry["Key"], entry["Size"], entry["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    @_mapped
    def _page(self, request: dict[str, Any]) -> Any:
        return self.client.list_objects_v2(**request)

    def lines(self, uri: str, *, etag: str | None = None) -> Iterator[bytes]:
        """The lines of an object, streamed, without their line ends; of the version `etag` where it is given."""
        body = self._open(uri, etag)
        lines = body.iter_lines(chunk_size=1 << 16)
        while True:
            line = self._next(lines)
            if line is None:
                return
            yield line

    @_mapped
    def _open(self, uri: str, etag: str | None) -> Any:
        bucket, key = split_uri(uri)
        pinned: dict[str, Any] = {"IfMatch": etag} if etag else {}
        return self.client.get_object(Bucket=bucket, Key=key, **pinned)["Body"]

    @staticmethod
    @_mapped
    def _next(lines: Iterator[bytes]) -> bytes | None:
        return next(lines, None)

    @_mapped
    def delete(self, uri: str) -> None:
        """Remove an object; one that is not there is no error."""
        bucket, key = split_uri(uri)
        self.client.delete_object(Bucket=bucket, Key=key)
