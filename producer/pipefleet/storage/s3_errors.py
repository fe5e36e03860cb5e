"""An error answer of S3 becomes an error of this package. The stores of producers and of workers both call `error_of`.

ServiceUnavailableError   the same request may succeed later: 5xx, throttling, a quota or a disk that is full
AccessDeniedError         S3 refuses the caller: its keys, its clock, its region, or its rights
ObjectRefusedError        S3 refuses the request for good: another try or another caller changes nothing
ObjectMissingError        there is no such bucket or object
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from pipefleet.contract.references import split_uri
from pipefleet.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    ObjectRefusedError,
    PipefleetError,
    ServiceUnavailableError,
)
from pipefleet.printable import printable
from pipefleet.settings import without_credentials

NO_CREDENTIALS = (
    "no S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or source the file that "
    "`pipefleet up --env-file` writes"
)
SKEW_SECONDS = 300.0
"""A refusal names this machine's clock as its cause if the clock is further off. S3 refuses requests that are 15 minutes off."""
_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"))
_SKEW = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}
_CREDENTIALS = {
    "InvalidAccessKeyId": "nobody has this AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "ExpiredToken": "AWS_SESSION_TOKEN has expired; get new credentials",
    "TokenRefreshRequired": "AWS_SESSION_TOKEN has expired; get new credentials",
    "InvalidToken": "AWS_SESSION_TOKEN is not valid; get new credentials",
    "InvalidClientTokenId": "nobody has this AWS_ACCESS_KEY_ID",
    "NotSignedUp": "the account has no S3",
    "AccountProblem": "the account is locked",
    "CredentialRetrievalError": "the role, profile or process that gives credentials fails",
}
_ACCESS = {"InvalidSecurity", "MissingSecurityHeader", "AllAccessDisabled"}
_REGION = {
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IncorrectEndpoint",
    "IllegalLocationConstraintException",
}
_OUTAGES = {"RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "OperationAborted"}
"""Answers with 4xx after which the same request may succeed."""
_FULL = re.compile(r"quota|storagefull|insufficient|slowdown|throttl|limitexceeded|toomanyrequests|outofcapacity", re.I)
_REFUSALS = {
    "KeyTooLongError": "the key is longer than 1,024 bytes; rename the object",
    "EntityTooLarge": "the object is too large for one request",
    "InvalidBucketName": "no bucket can have this name",
    "InvalidObjectState": "the object is archived; restore it first",
    "NotImplemented": "the server cannot do this; use another",
}
_KMS = re.compile(r"^KMS\.", re.I)
_SERVER_TIME = re.compile(r"<ServerTime>([^<]+)</ServerTime>")


@dataclass(frozen=True, slots=True)
class Answer:
    """An error answer of S3. `code` is empty where the answer has none, as the answer to a HEAD."""

    status: int
    code: str = ""
    region: str = ""
    """The region that the server expects, where the answer tells it."""
    behind: float | None = None
    """Seconds that this machine's clock is behind the server's; None where the answer does not tell."""

    @property
    def is_vague(self) -> bool:
        """Whether a request whose answer has a body would tell more."""
        return self.status in (400, 403, 405, 501) and (not self.code or self.code.isdigit())


def endpoint() -> str:
    """The URL of the object store in use, without credentials."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return without_credentials(url) if url else "AWS"


def error_of(answer: Answer, uri: str) -> PipefleetError:
    """The error of this package for an answer about `uri`."""
    status, code = answer.status, answer.code
    if status == 404 or code in ("NoSuchBucket", "NoSuchKey", "NotFound"):
        return _missing(code, uri)
    if status == 412:
        return ObjectChangedError(f"{uri} was changed after its version was noted; start again with the present one")
    if code in _OUTAGES or _FULL.search(code) or status in (0, 307, 408, 409, 429) or (status >= 500 and status != 501):
        what = f"{status} {printable(code)}".strip()
        return ServiceUnavailableError(f"S3 at {endpoint()} failed with {what}; try again later")
    if code in _REFUSALS or _KMS.match(code):
        return _refused(answer, uri)
    if code in {*_CREDENTIALS, *_ACCESS, *_REGION, *_SKEW} or status in (301, 401, 403):
        return AccessDeniedError(f"S3 at {endpoint()} refuses access ({_named(answer)}); {_cause(answer, uri)}")
    return _refused(answer, uri)


def clock_sentence(behind: float, whose: str) -> str:
    """A clause with how far this machine's clock is from another, and the next step."""
    return f"the clock of this machine is {_span(abs(behind))} {'behind' if behind > 0 else 'ahead of'} {whose}; set it (NTP)"


def _span(seconds: float) -> str:
    """A length of time in the largest unit that gives 2 or more."""
    size, name = next((one for one in _UNITS if seconds >= 2 * one[0]), (1, "seconds"))
    return f"{seconds / size:.0f} {name}"


def server_time(headers: Mapping[str, str], body: str = "") -> float | None:
    """The time of an answer, in seconds since 1970 by the server's clock; None where neither its body nor its `date` tells it."""
    from datetime import datetime

    try:
        found = _SERVER_TIME.search(body)
        if found:
            return datetime.fromisoformat(found[1].replace("Z", "+00:00")).timestamp()
        return parsedate_to_datetime(headers["date"]).timestamp()
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def _missing(code: str, uri: str) -> PipefleetError:
    if code == "NoSuchBucket":
        return ObjectMissingError(f"there is no bucket {split_uri(uri)[0]!r} at {endpoint()}; create it first")
    return ObjectMissingError(f"there is no object {uri}, or no such bucket, at {endpoint()}")


def _refused(answer: Answer, uri: str) -> PipefleetError:
    if _KMS.match(answer.code):
        why = "its encryption key cannot be used; enable the key"
    else:
        why = _REFUSALS.get(answer.code, "the same request will be refused again")
    return ObjectRefusedError(f"S3 at {endpoint()} refuses {uri} ({_named(answer)}): {why}")


def _named(answer: Answer) -> str:
    return printable(answer.code) or str(answer.status)


def _cause(answer: Answer, uri: str) -> str:
    skewed = answer.behind is not None and abs(answer.behind) > SKEW_SECONDS
    if answer.behind is not None and (skewed or answer.code in _SKEW):
        return clock_sentence(answer.behind, "the store's")
    if answer.code in _SKEW:
        return "the clock of this machine is not the store's; set it (NTP)"
    if answer.code in _REGION or answer.status == 301:
        bucket = split_uri(uri)[0]
        wanted = f"set AWS_REGION to {printable(answer.region)}" if answer.region else "set AWS_REGION to its region"
        return f"the bucket {bucket!r} is in another region: {wanted}"
    why = _CREDENTIALS.get(answer.code)
    return f"check the AWS_* credentials: {why}" if why else "check the AWS_* credentials and what their policy allows"
