"""The output of a process: logs and notes, as text for people or, with PIPEFLEET_LOG=json, one JSON object on each line.

    {"time": "2026-01-31T12:00:00.123Z", "level": "ERROR", "logger": …, "message": …, "pool": …, "worker": …, "job": …, "run": …,
     "exception": "Traceback …"}

Unknown fields are left out. A supervisor adds `device` to the lines of its workers. Payloads and credentials are never logged,
in either form. Every record of this process, from any library, goes through one formatter. It escapes characters that a
terminal would obey, puts a message on one line, and indents the lines of a traceback, so that no text of a message can look
like a line of the log.

Long-running commands call `configure` at their start. A wrong PIPEFLEET_LOG raises UsageError.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from pipefleet.errors import PipefleetError, UsageError
from pipefleet.printable import LineFormatter, message_of, printable, printable_lines, trace_of

log = logging.getLogger(__name__)
VARIABLE = "PIPEFLEET_LOG"
FIELDS = ("pool", "worker", "job", "run")
"""Further fields of a record, from its attributes (`extra=`) or from `log_context`."""
NOISY = ("httpx", "celery", "kombu", "transformers")
"""Libraries whose records below WARNING are dropped."""
MOST_FIELD = 300
"""Characters of one of FIELDS in a line."""
_context: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("pipefleet_log", default={})  # noqa: B039


def as_json() -> bool:
    """Whether lines are JSON. Raises UsageError if PIPEFLEET_LOG is neither `json` nor `text`."""
    chosen = os.environ.get(VARIABLE, "text").lower() or "text"
    if chosen not in ("json", "text"):
        raise UsageError(f"{VARIABLE} must be json or text, not {chosen[:40]!r}")
    return chosen == "json"


def configure(stream: TextIO | None = None, **fields: str) -> None:
    """Send this process's logs from INFO up to `stream` (stderr), with `fields` (see FIELDS) in every line. Raises UsageError."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(fields) if as_json() else _text())
    root = logging.getLogger()
    for earlier in [one for one in root.handlers if isinstance(one.formatter, JsonFormatter)]:
        root.removeHandler(earlier)  # a process knows some fields only after its first lines
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _adopt_the_rest()
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def adopt_transformers() -> None:
    """After transformers is imported: remove its own log handler, and with JSON logs its progress bars."""
    logger = logging.getLogger("transformers")
    logger.handlers.clear()
    logger.propagate = True
    if as_json():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _adopt_the_rest() -> None:
    """Log the direct prints of Python: warnings, and errors that end a thread or the process; for JSON also Celery's notes."""

    def thread_ended(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_type is not SystemExit:
            name = failed.thread.name if failed.thread else "?"
            error = failed.exc_value or failed.exc_type()
            log.error("the thread %s ended", name, exc_info=(failed.exc_type, error, failed.exc_traceback))

    def process_ends(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("the process ends", exc_info=(kind, error, trace))

    logging.captureWarnings(True)
    threading.excepthook = thread_ended
    sys.excepthook = process_ends
    if as_json():
        from celery.apps import worker

        worker.safe_say = lambda text, *_: log.info(text)


@contextmanager
def log_context(**fields: str | None) -> Iterator[None]:
    """Add `fields` (see FIELDS) to every line that this thread logs inside the block; None is left out."""
    token = _context.set({**_context.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """With JSON logs, an error that the command line would print becomes a log line, and ends the process."""
    try:
        yield
    except PipefleetError as error:
        if not as_json():
            raise
        log.error("%s", error)
        sys.exit(error.exit_code)


def say(text: str, *, trouble: bool = False, **fields: str) -> None:
    """Print a note: as text on stdout, on stderr for `trouble`; with JSON logs as a line on stderr. Nobody needs to read it."""
    if not as_json():
        _print(printable_lines(text), sys.stderr if trouble else sys.stdout)
        return
    level = logging.WARNING if trouble else logging.INFO
    record = logging.LogRecord("pipefleet.up", level, __file__, 0, text, None, None)
    record.__dict__.update(fields)
    _print(JsonFormatter({}).format(record), sys.stderr)


def _print(line: str, stream: TextIO) -> None:
    """Print at once. A reader that is gone does not end the process, whose children work on."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class JsonFormatter(logging.Formatter):
    """One JSON object for each record, on one line. `fields` are the fields of the process."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": printable_lines(message_of(record), indent=""),
        }
        fields = {**self._fields, **_context.get()}
        fields |= {name: str(getattr(record, name)) for name in FIELDS if getattr(record, name, None) is not None}
        line |= {name: printable(value, MOST_FIELD) for name, value in fields.items()}
        if trace := trace_of(self, record):
            line["exception"] = trace
        return json.dumps(line)


def _text() -> logging.Formatter:
    return LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
