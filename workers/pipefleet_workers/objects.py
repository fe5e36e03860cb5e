"""The worker's object store: reads and conditional writes through obstore, in Rust and outside the GIL.

obstore must not be used before a fork; workers never fork. Its errors are mapped here, and nowhere else. Thread-safe.
"""

from __future__ import annotations

import functools
import os
import threading
from datetime import timedelta
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

from pipefleet.errors import ServiceUnavailableError
from pipefleet.objects import AccessDeniedError, ObjectMissingError, endpoint
from pipefleet.storage import StorageRef, split_uri


class ObjectChangedError(ObjectMissingError):
    """The object is there, but no longer the version that was meant."""

    code = "changed"


class WorkerStore:
    """Reads and writes objects by `s3://` URI.

    Raises ObjectMissingError, ObjectChangedError, AccessDeniedError, or ServiceUnavailableError after bounded retries.
    """

    def __init__(self, *, retries: int = 6, retry_seconds: float = 30.0) -> None:
        self._retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=retry_seconds)}
        self._lock = threading.Lock()

    def get(self, reference: StorageRef) -> bytes:
        """The bytes of an object, of the pinned version where the reference has an ETag."""
        options: Any = {"if_match": f'"{reference.etag}"'} if reference.etag else {}
        try:
            found = obstore.get(self._bucket(reference.bucket), reference.key, options=options)
            return bytes(found.bytes())
        except (BaseError, OSError) as error:
            raise _mapped(error, reference.uri) from None

    def exists(self, uri: str) -> bool:
        """Whether there is an object at `uri`."""
        bucket, key = split_uri(uri)
        try:
            obstore.head(self._bucket(bucket), key)
        except (FileNotFoundError, NotFoundError):
            return False
        except (BaseError, OSError) as error:
            raise _mapped(error, uri) from None
        return True

    def put(self, uri: str, body: bytes, *, content_type: str) -> None:
        """Write an object, replacing one that is there."""
        self._put(uri, body, content_type, mode="overwrite")

    def put_new(self, uri: str, body: bytes, *, content_type: str) -> bool:
        """Write an object unless there is one already, atomically. True if this call wrote it."""
        try:
            self._put(uri, body, content_type, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def _put(self, uri: str, body: bytes, content_type: str, *, mode: Any) -> None:
        bucket, key = split_uri(uri)
        try:
            # A multipart upload cannot be conditional on every server, and parts are far below the limit of one PUT.
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
        except (BaseError, OSError) as error:
            raise _mapped(error, uri) from None

    def _bucket(self, name: str) -> S3Store:
        with self._lock:
            return self._open(name)

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one store lives as long as its worker
    def _open(self, name: str) -> S3Store:
        url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        custom: Any = {"endpoint": url, "virtual_hosted_style_request": False} if url else {}
        client: Any = {"allow_http": bool(url and url.startswith("http://")), "timeout": "120 seconds"}
        return S3Store(name, region=region, client_options=client, retry_config=self._retry, **custom)


def _mapped(error: Exception, uri: str) -> Exception:
    if isinstance(error, FileNotFoundError | NotFoundError):
        return ObjectMissingError(f"there is no object {uri}")
    if isinstance(error, PreconditionError):
        return ObjectChangedError(f"{uri} was changed after the run was planned")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return AccessDeniedError(f"S3 refuses access to {uri}; check the credentials of the worker")
    return ServiceUnavailableError(f"S3 at {endpoint()} does not answer for {uri} ({type(error).__name__})")
