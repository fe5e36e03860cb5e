"""What a process says while it runs: logs and notes, as text for people or, with PIPEFLEET_LOG=json, one JSON object a line.

    {"time": "2026-01-31T12:00:00.123Z", "level": "ERROR", "logger": …, "message": …, "pool": …, "worker": …, "job": …, "run": …,
     "exception": "Traceback …"}

What is not known is left out. Payloads and credentials are never logged, in either form. Every record of this process, of whichever
library, goes through one formatter: what a terminal would obey is escaped, a message is one line, and the lines of a traceback are
indented, so that no text of a message passes for a line of the log.
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
"""What a record may say besides, as attributes (`extra=`) or from `log_context`."""
NOISY = ("httpx", "celery", "kombu", "transformers")
"""Libraries whose lines below WARNING are nobody's concern."""
MOST_FIELD = 300
"""Characters of one of FIELDS in a line."""
_context: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("pipefleet_log", default={})  # noqa: B039


def as_json() -> bool:
    """Whether lines are JSON. Raises UsageError for a value of PIPEFLEET_LOG that is neither `json` nor `text`."""
    chosen = os.environ.get(VARIABLE, "text").lower() or "text"
    if chosen not in ("json", "text"):
        raise UsageError(f"{VARIABLE} must be json or text, not {chosen[:40]!r}")
    return chosen == "json"


def configure(stream: TextIO | None = None, **fields: str) -> None:
    """Send this process's logs from INFO up to `stream` (stderr), `fields` (see FIELDS) with every line. Raises UsageError."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(fields) if as_json() else _text())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _adopt_the_rest()
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)


def adopt_transformers() -> None:
    """Take from transformers, once it is imported, the handler that it brings, and from JSON logs its progress bars."""
    logger = logging.getLogger("transformers")
    logger.handlers.clear()
    logger.propagate = True
    if as_json():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def _adopt_the_rest() -> None:
    """What Python would print past the loggers: warnings, errors that end a thread or the process; for JSON, Celery's notes too."""

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
    """`fields` (see FIELDS) with every line that this thread logs inside the block; None is left out."""
    token = _context.set({**_context.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _context.reset(token)


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """With JSON logs, an error that the command line would print becomes a line like all others, and ends the process."""
    try:
        yield
    except PipefleetError as error:
        if not as_json():
            raise
        log.error("%s", error)
        sys.exit(error.exit_code)


def say(text: str, *, trouble: bool = False, **fields: str) -> None:
    """A note to who watches the process: as text on stdout, on stderr for `trouble`; or as a line of JSON on stderr."""
    if not as_json():
        print(printable_lines(text), file=sys.stderr if trouble else sys.stdout, flush=True)
        return
    level = logging.WARNING if trouble else logging.INFO
    record = logging.LogRecord("pipefleet.up", level, __file__, 0, text, None, None)
    record.__dict__.update(fields)
    print(JsonFormatter({}).format(record), file=sys.stderr, flush=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a record, on one line. `fields` are those of the process."""

    def __init__(self, fields: dict[str, str]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
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
