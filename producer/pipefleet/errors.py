"""Every error that pipefleet raises, as one tree. The command line turns each into one sentence and an exit code.

    PipefleetError
    ├── UsageError                  exit 2: the caller can mend it; also a ValueError
    │   ├── UnknownTaskError        no such task; also a KeyError, as in transformers
    │   ├── UnknownModelError       nobody in the fleet serves this model
    │   ├── ParameterError          a parameter that the task does not take, or a value out of bounds
    │   ├── InputError              an input of a kind that the task does not take
    │   ├── SourceError             a source that is missing, empty or unreadable
    │   │   ├── ManifestError       a line of a manifest that cannot be used (names line and column)
    │   │   ├── ObjectMissingError  no such bucket or object
    │   │   │   └── ObjectChangedError  the object is there, but not the version that was meant
    │   │   ├── ObjectRefusedError  S3 will never take this request: a key too long, an archived object
    │   │   └── AccessDeniedError   the credentials do not allow this
    │   ├── FleetFileError          fleet.toml is wrong (names the key)
    │   ├── RunError                no run at this URI, or one that is there already
    │   ├── FleetMismatchError      Redis belongs to a fleet with another store, or of another release
    │   ├── ConflictError           an idempotency key that stands for another request
    │   └── ContractError           a message that no version of the contract describes
    ├── ServiceUnavailableError     exit 3: Redis or S3 does not answer
    │   └── ServiceFullError        Redis is at its `maxmemory`
    └── JobError                    exit 1: a job or an item that ended without a result
        ├── JobFailedError          it failed (code, stage and message say how)
        ├── JobCancelledError       somebody cancelled it
        ├── JobExpiredError         its deadline passed before it could finish
        └── ResultTimeoutError      exit 4: it has not finished yet; also a TimeoutError

`code` is a stable word for programs. `retryable` tells whether the same call may succeed later. Errors of redis-py and botocore
become errors of this tree in `pipefleet.connection.errors` and `pipefleet.storage.s3_errors`, and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar

from pipefleet.printable import printable_lines


class PipefleetError(Exception):
    """Base of all errors of this package. The message is one sentence that names cause and next step.

    `str()` is safe for a terminal, in a traceback too: control characters are escaped, lines after the first are indented.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2
    retryable: ClassVar[bool] = False

    def __str__(self) -> str:
        return printable_lines(Exception.__str__(self))  # that of a KeyError would be in quotes


class UsageError(PipefleetError, ValueError):
    """The call cannot work as it was made; nothing was started. Also a ValueError, for code that catches Python's own."""

    code = "usage"


class UnknownTaskError(UsageError, KeyError):
    """No task has this name or alias. Also a KeyError, which `transformers.pipeline` raises for it."""

    code = "unknown_task"


class UnknownModelError(UsageError):
    """No pool of the fleet serves this model for this task."""

    code = "unknown_model"


class ParameterError(UsageError):
    """A parameter outside the task's allow-list, or a value outside its bounds."""

    code = "bad_parameter"


class InputError(UsageError):
    """An input of a kind that the task does not take."""

    code = "bad_input"


class SourceError(UsageError):
    """The source of a run is missing, empty or not readable."""

    code = "bad_source"


class ManifestError(SourceError):
    """A manifest line that cannot be used; the message names line and column (both counted from 1)."""

    code = "bad_manifest"


class ObjectMissingError(SourceError):
    """There is no such bucket or object; the message names it."""

    code = "not_found"


class ObjectChangedError(ObjectMissingError):
    """The object is there, but not in the version that was asked for."""

    code = "changed"


class ObjectRefusedError(SourceError):
    """S3 refuses this request for good, from any caller: a key that is too long, an archived object, a disabled encryption key."""

    code = "bad_object"


class AccessDeniedError(SourceError):
    """The credentials do not allow this or are not valid, or this machine's clock or region is wrong."""

    code = "forbidden"


class FleetFileError(UsageError):
    """The fleet file is wrong; the message names the key and, for a typo, the nearest right one."""

    code = "bad_fleet"


class RunError(UsageError):
    """There is no run at this URI, there is one already, or nobody goes on with it."""

    code = "bad_run"


class FleetMismatchError(UsageError):
    """Redis belongs to a fleet with another store, or of a release with another contract; the message names both."""

    code = "other_fleet"


class ConflictError(UsageError):
    """The idempotency key stands for another request. The message names the key and that request's job, `job_id`."""

    code = "conflict"

    def __init__(self, message: str, *, job_id: str = "") -> None:
        super().__init__(message)
        self.job_id = job_id  # copy and pickle make the error of its message alone and set this afterwards


class ContractError(UsageError):
    """A message does not follow the contract, or follows a version that this release does not know."""

    code = "bad_contract"


class ServiceUnavailableError(PipefleetError):
    """Redis or the object store does not answer, or answers with a passing error. The message names the URL without credentials."""

    code = "unavailable"
    exit_code = 3
    retryable = True


class ServiceFullError(ServiceUnavailableError):
    """Redis is at its `maxmemory`, and the command needs memory."""

    code = "full"


class JobError(PipefleetError):
    """A job ended, or was waited for, without a result."""

    exit_code = 1


class JobFailedError(JobError):
    """The job failed in a worker: `failure_code`, `stage` and the message tell how."""

    code = "failed"

    def __init__(self, message: str, *, failure_code: str = "failed", stage: str = "") -> None:
        super().__init__(message)
        self.failure_code = failure_code
        self.stage = stage


class JobCancelledError(JobError):
    """The job was cancelled before it finished."""

    code = "cancelled"


class JobExpiredError(JobError):
    """The job's deadline passed before it finished."""

    code = "expired"


class ResultTimeoutError(JobError, TimeoutError):
    """The result was not there in time; the job goes on and can be waited for again."""

    code = "timeout"
    exit_code = 4
    retryable = True


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
