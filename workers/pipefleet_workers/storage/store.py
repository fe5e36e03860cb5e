"""The worker's object store: reads and conditional writes through obstore, in Rust and outside Python's lock. Thread-safe.

Fetching, shards and results go through it. The errors of obstore are translated here, and only here. S3 takes keys that obstore
refuses or silently shortens (`a//b`, `/a`, `a/`, control characters): requests for these go through boto3. obstore must not be used
before a fork; workers never fork.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from pipefleet.contract.references import StorageRef, split_uri
from pipefleet.errors import (
    AccessDeniedError,
    InputError,
    ObjectChangedError,
    ObjectMissingError,
    PipefleetError,
    ServiceUnavailableError,
    SourceError,
)
from pipefleet.storage.s3_errors import NO_CREDENTIALS, Answer, endpoint, error_of, server_time
from pipefleet.storage.store import ObjectStore, renewals, s3_errors

_ODD_KEY = re.compile(r"^/|//|/$|[\x00-\x1f\x7f]")
"""Keys that obstore does not take unchanged."""
_STATUS, _CODE, _REGION = (
    re.compile(one) for one in (r"status code: (\d{3})", r"<Code>([^<]+)</Code>", r"<Region>([^<]+)</Region>")
)
MOST_BUCKETS = 256
"""Buckets that are kept open."""
CREDENTIALS_SECONDS = 300.0
"""Seconds until credentials of a file or a role are read again; botocore renews the credentials of a role before they expire."""


class ObjectTooLargeError(SourceError):
    """The object has more bytes than the caller accepts."""

    code = "too_large"


class ObjectSizeError(SourceError):
    """The object has another size than its reference says."""

    code = "truncated_media"


class BarredError(ServiceUnavailableError):
    """S3 refuses every request of this worker: its jobs go back to their queue, for workers that are not refused."""


class RefusedHereError(ServiceUnavailableError):
    """S3 refuses this worker a request in a bucket, and may allow it to another worker: the job goes back for the other worker."""


class WorkerStore:
    """Reads and writes objects by `s3://` URI.

    Raises ObjectMissingError, AccessDeniedError, ObjectRefusedError, InputError for a key that no server takes, or
    ServiceUnavailableError after bounded retries. Credentials are those of the environment, of the AWS files or of a role.
    """

    def __init__(self, *, retries: int = 6, retry_seconds: float = 30.0) -> None:
        self._retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=retry_seconds)}
        self._lock = threading.Lock()
        self._plain = ObjectStore()
        self._open: dict[str, S3Store] = {}
        self._of = renewals()
        self._seen = threading.local()
        self._on_denied: Callable[[AccessDeniedError, int], None] = _nothing
        self._on_refused: Callable[[str], None] = _nowhere
        self._read: dict[str, str] = {}
        """By bucket, the key that was read last."""

    def report_refusals(
        self,
        *,
        on_denied: Callable[[AccessDeniedError, int], None] | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """Call these functions before a refusal of access is raised. An error that one of them raises is raised instead.

        `on_denied` gets the refusal, and `renewals()` as of the request's credentials. Then `on_refused` gets the bucket, unless
        only one object is refused in a bucket that can still be read.
        """
        self._on_denied, self._on_refused = on_denied or _nothing, on_refused or _nowhere

    def get(self, reference: StorageRef, *, max_bytes: int | None = None) -> bytes:
        """The bytes of an object; of the pinned version if the reference has an ETag.

        Raises ObjectChangedError for another version. Raises ObjectTooLargeError above `max_bytes`, and ObjectSizeError if the size
        differs from the reference; both before the bytes are read.
        """
        bucket, key = _split(reference.uri)
        if _ODD_KEY.search(key):
            return self._get_plain(reference, max_bytes)
        options: Any = {"if_match": f'"{reference.etag}"'} if reference.etag else {}
        try:
            found = obstore.get(self._bucket(bucket), key, options=options)
            _check_size(reference, found.meta["size"], max_bytes)
            content = bytes(found.bytes())
        except (BaseError, OSError, ValueError, AccessDeniedError) as error:
            raise self._mapped(error, reference.uri, reads=True) from None
        self._note_read(bucket, key)
        return content

    def exists(self, uri: str) -> bool:
        """Whether there is an object at `uri`."""
        bucket, key = _split(uri)
        if _ODD_KEY.search(key):
            with self._told(uri):
                return self._plain.head(uri) is not None
        try:
            obstore.head(self._bucket(bucket), key)
        except (FileNotFoundError, NotFoundError):
            return False
        except (BaseError, OSError, ValueError, AccessDeniedError) as error:
            if _answer(
                error, uri
            ).is_vague:  # the answer to a HEAD has no body with a reason; the answer to a GET has one
                return self._is_read(uri)
            raise self._mapped(error, uri) from None
        return True

    def _is_read(self, uri: str) -> bool:
        bucket, key = _split(uri)
        try:
            obstore.get(self._bucket(bucket), key)
        except (FileNotFoundError, NotFoundError):
            return False
        except (BaseError, OSError, ValueError, AccessDeniedError) as error:
            raise self._mapped(error, uri) from None
        return True

    def put(self, uri: str, body: bytes, *, content_type: str) -> None:
        """Write an object; replaces an existing one."""
        if _ODD_KEY.search(_split(uri)[1]):
            with self._told(uri):
                self._plain.put(uri, body, content_type=content_type)
        else:
            self._put(uri, body, content_type, mode="overwrite")

    def put_new(self, uri: str, body: bytes, *, content_type: str) -> bool:
        """Write an object unless one exists already, atomically. True if this call wrote it."""
        if _ODD_KEY.search(_split(uri)[1]):
            with self._told(uri):
                return self._plain.put_new(uri, body, content_type=content_type)
        try:
            self._put(uri, body, content_type, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def _get_plain(self, reference: StorageRef, max_bytes: int | None) -> bytes:
        pinned: Any = {"IfMatch": f'"{reference.etag}"'} if reference.etag else {}
        with self._told(reference.uri), s3_errors(reference.uri):
            found = self._plain.client.get_object(Bucket=reference.bucket, Key=reference.key, **pinned)
            with closing(found["Body"]) as body:
                _check_size(reference, found["ContentLength"], max_bytes)
                return body.read()

    def _put(self, uri: str, body: bytes, content_type: str, *, mode: Any) -> None:
        bucket, key = split_uri(uri)
        try:
            # Not every server supports conditional multipart uploads, and parts are far below the limit of one PUT.
            obstore.put(
                self._bucket(bucket),
                key,
                body,
                mode=mode,
                attributes={"Content-Type": content_type},
                use_multipart=False,
            )
        except AlreadyExistsError:
            raise
        except (BaseError, OSError, ValueError, AccessDeniedError) as error:
            raise self._mapped(error, uri) from None

    def _mapped(self, error: Exception, uri: str, *, reads: bool = False) -> Exception:
        found = error if isinstance(error, PipefleetError) else _mapped(error, uri)
        if isinstance(found, AccessDeniedError):
            self._on_denied(found, getattr(self._seen, "of", renewals()))
            if not (reads and self._goes_on_reading(split_uri(uri)[0])):
                self._on_refused(split_uri(uri)[0])
        return found

    def _note_read(self, bucket: str, key: str) -> None:
        if len(self._read) >= MOST_BUCKETS and bucket not in self._read:
            self._read.clear()
        self._read[bucket] = key

    def _goes_on_reading(self, bucket: str) -> bool:
        """Whether the object that was read last in a bucket can still be read. If so, S3 does not refuse the bucket."""
        key = self._read.get(bucket)
        if key is None:
            return False
        try:
            obstore.head(self._bucket(bucket), key)
        except (FileNotFoundError, NotFoundError):
            return True
        except (BaseError, OSError, ValueError, PipefleetError):
            self._read.pop(bucket, None)
            return False
        return True

    @contextmanager
    def _told(self, uri: str) -> Iterator[None]:
        """A context for requests through boto3: it reports a refusal of access, and raises it."""
        seen = renewals()
        try:
            yield
        except AccessDeniedError as error:
            self._on_denied(error, seen)
            self._on_refused(split_uri(uri)[0])
            raise

    def _bucket(self, name: str) -> S3Store:
        with self._lock:
            if self._of != renewals() or len(self._open) >= MOST_BUCKETS:
                self._of = renewals()
                self._open.clear()
            self._seen.of = self._of
            if name not in self._open:
                self._open[name] = _opened(name, self._retry)
            return self._open[name]


def _opened(name: str, retry: Any) -> S3Store:
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    custom: Any = {"endpoint": url, "virtual_hosted_style_request": False} if url else {}
    client: Any = {"allow_http": bool(url and url.startswith("http://")), "timeout": "120 seconds"}
    if not os.environ.get("AWS_ACCESS_KEY_ID") and not os.environ.get("AWS_SKIP_SIGNATURE"):
        custom["credential_provider"] = _Credentials(name)
    return S3Store(name, region=region, client_options=client, retry_config=retry, **custom)


class _Credentials:
    """Gives obstore the credentials that boto3 finds, so that both clients of a worker use the same. Thread-safe."""

    def __init__(self, bucket: str) -> None:
        import boto3

        with s3_errors(f"s3://{bucket}/"):
            self._found: Any = boto3.session.Session().get_credentials()
        if self._found is None:
            raise AccessDeniedError(NO_CREDENTIALS)

    def __call__(self) -> Any:
        """Keys that obstore may use for a while."""
        keys = self._found.get_frozen_credentials()
        until = datetime.now(UTC) + timedelta(seconds=CREDENTIALS_SECONDS)
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": until,
        }


def _nothing(error: AccessDeniedError, seen: int) -> None:
    """The default of `on_denied`: do nothing."""


def _nowhere(bucket: str) -> None:
    """The default of `on_refused`: do nothing."""


def _split(uri: str) -> tuple[str, str]:
    """Bucket and key. A key with a `.` or `..` between slashes is refused: some servers refuse it, others resolve it."""
    bucket, key = split_uri(uri)
    if not key or any(segment in (".", "..") for segment in key.split("/")):
        raise InputError(f"{uri} has no key that can be read or written: it is empty, or has . or .. between slashes")
    return bucket, key


def _check_size(reference: StorageRef, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise ObjectTooLargeError(f"{reference.uri} has {size} bytes, above the bound of {max_bytes}")
    if reference.size is not None and size != reference.size:
        raise ObjectSizeError(f"{reference.uri} has {size} bytes instead of {reference.size}")


def _mapped(error: Exception, uri: str) -> PipefleetError:
    answer = _answer(error, uri)
    if answer.status:
        found = error_of(answer, uri)
        return found if uri in str(found) else type(found)(f"{uri}: {found}")
    if isinstance(error, FileNotFoundError | NotFoundError):
        return ObjectMissingError(f"there is no object {uri}")
    if isinstance(error, PreconditionError):
        return ObjectChangedError(f"{uri} was changed after the run was planned")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return AccessDeniedError(f"{uri}: {error_of(Answer(403), uri)}")
    if "incorrectly configured region" in str(error):
        return error_of(Answer(301), uri)
    if isinstance(error, ValueError):
        return InputError(f"{uri} has a key that cannot be read or written; rename the object")
    return ServiceUnavailableError(f"S3 at {endpoint()} does not answer for {uri} ({type(error).__name__})")


def _answer(error: Exception, uri: str) -> Answer:
    """The answer of S3, read from obstore's text, its only form there. Status 0 if the text shows no answer."""
    text = str(error).replace(split_uri(uri)[1] or "\n", "")  # a key may contain words that look like an answer
    status, code, region = (one.search(text) for one in (_STATUS, _CODE, _REGION))
    at = server_time({}, text)
    return Answer(
        int(status[1]) if status else 0,
        code[1] if code else "",
        region[1] if region else "",
        None if at is None else at - time.time(),
    )
