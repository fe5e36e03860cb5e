"""Foreign text made safe for a terminal and for a log.

Text of a message, a file or a server comes in. Text goes out in which every character that a terminal would obey is escaped,
and in which no line looks like the first line of a log entry. Error messages, loggers and the command line use it. Nothing fails.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

MOST_MESSAGE = 8_000
"""Characters of one message, or of one line of a traceback, in a log."""
MOST_TRACE = 40_000
"""Characters of a traceback in a log. A longer traceback keeps its beginning and its end."""
INDENT = "    "
"""Every line of a message after the first begins with this, so that it does not look like another message."""


def printable(text: str, most: int = 80) -> str:
    """`text` on one line of at most `most` characters; characters that a terminal would obey are escaped."""
    shown = _escaped(text[: most + 1])
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def printable_lines(text: str, most: int = MOST_MESSAGE, *, indent: str = INDENT) -> str:
    """`text` with its line feeds: each line as of `printable`, lines after the first indented, about `most` characters in all."""
    first, *others = text[: most + 1].split("\n")
    kept = [one if one.startswith("  ") or not one else indent + one for one in others]
    return "\n".join(printable(one, most) for one in (first, *kept))


def printable_json(value: Any, *, indent: int | None = None, encoding: str | None = None) -> str:
    """`value` as JSON without characters that a terminal obeys, or that `encoding` lacks: those are escaped.

    The JSON has the same value, but NaN and infinity become null, because JSON has no words for them.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    except ValueError:
        value = _finite(value)
        text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    text = _DOUBTFUL.sub(_escaped_in_json, text)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")
    return text


_DOUBTFUL = re.compile(r"[^ -~\n]")


def _escaped_in_json(found: re.Match[str]) -> str:
    one, before = found[0], found.string[found.start() - 1]
    return one if _is_shown(one, before) else "\\u007f" if one == "\x7f" else json.dumps(one)[1:-1]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        one if _is_shown(one, before) else one.encode("unicode_escape").decode()
        for before, one in zip(f" {text}", text, strict=False)
    )


_SPACES = frozenset("\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000")
_JOINERS = frozenset("\u200c\u200d")


def _is_shown(one: str, before: str) -> bool:
    """Whether a character is shown as it is. Joiners are shown where Persian, Indic scripts and emoji use them, not after ASCII."""
    return one.isprintable() or one in _SPACES or (one in _JOINERS and not before.isascii())


class LineFormatter(logging.Formatter):
    """Formats log records: the message on one line, the traceback indented below, every control character escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of the record without a line end, and below it the traceback where there is one."""
        record.message = message_of(record)
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        head = printable(self.formatMessage(record), MOST_MESSAGE)
        trace = trace_of(self, record)
        return "\n".join([head, *(INDENT + line for line in trace.split("\n"))]) if trace else head


def message_of(record: logging.LogRecord) -> str:
    """The message of a record with its arguments. Arguments that do not fit are left out: a wrong call must not end the logging."""
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - arguments may raise anything when they become text
        return str(record.msg)


def trace_of(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback and the stack of a record, each line as of `printable`; empty where the record has neither."""
    has_error = record.exc_info and record.exc_info[0] is not None
    parts = [formatter.formatException(record.exc_info) if has_error and record.exc_info else record.exc_text or ""]
    parts.append(record.stack_info or "")
    text = "\n".join(part for part in parts if part)
    if len(text) > MOST_TRACE:
        text = f"{text[: MOST_TRACE // 4]}\n…\n{text[-(MOST_TRACE * 3 // 4) :]}"
    return "\n".join(printable(line, MOST_MESSAGE) for line in text.split("\n"))
