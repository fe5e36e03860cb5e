"""Logs as JSON: one object a line, with what is known of the job, and exceptions as one field."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from pipefleet.errors import UsageError
from pipefleet.printable import LineFormatter
from pipefleet_workers.observe import logs
from pipefleet_workers.observe.logs import JsonFormatter, log_context, say
from tests.checkpoints import cached
from tests.servers import until

log = logging.getLogger("pipefleet_workers.test")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    """What this module logs, formatted as JSON."""
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter({"pool": "texts", "worker": "texts@host-1"}))
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    log.setLevel(logging.INFO)
    return stream


def parsed(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_who_and_which_job(lines: StringIO) -> None:
    with log_context(job="j1", run=None):
        log.warning("bad %s\nin two lines", "news")
    log.info("later", extra={"job": "j2", "run": "r2"})
    first, second = parsed(lines)
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "WARNING", "logger": log.name, "message": "bad news\nin two lines", "pool": "texts",
        "worker": "texts@host-1", "job": "j1",
    }  # fmt: skip
    assert (second["job"], second["run"]) == ("j2", "r2")


def test_an_exception_is_one_field(lines: StringIO) -> None:
    try:
        raise ValueError("nothing in it")
    except ValueError:
        log.exception("failed")
    (line,) = parsed(lines)
    assert line["exception"].splitlines()[0].startswith("Traceback")
    assert line["exception"].splitlines()[-1] == "ValueError: nothing in it"


def test_each_thread_has_its_own_job(lines: StringIO) -> None:
    with log_context(job="mine"):
        other = threading.Thread(target=log.info, args=("from elsewhere",))
        other.start()
        other.join()
    assert "job" not in parsed(lines)[0]


def test_notes_are_text_or_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    say("pool a: 0 -> 1 worker", pool="a")
    say("it broke", trouble=True)
    assert capsys.readouterr() == ("pool a: 0 -> 1 worker\n", "it broke\n")
    monkeypatch.setenv(logs.VARIABLE, "json")
    say("pool a: 0 -> 1 worker", pool="a")
    out, err = capsys.readouterr()
    assert out == ""
    assert (json.loads(err)["message"], json.loads(err)["pool"]) == ("pool a: 0 -> 1 worker", "a")


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(UsageError, match="PIPEFLEET_LOG must be json or text, not 'xml'"):
        logs.as_json()


def test_every_line_of_a_worker_is_json(client: Any, tmp_path: Path) -> None:
    """With what its libraries log, too."""
    fleet = tmp_path / "fleet.toml"
    checkpoint = cached("text-classification")
    fleet.write_text(f'[pools.texts]\ntask = "text-classification"\nmodel = "{checkpoint}"\n')
    settings = {"PIPEFLEET_LOG": "json", "PIPEFLEET_FLEET": str(fleet), "PIPEFLEET_WORKER_WARM_UP": "false"}
    ready, output = tmp_path / "ready", tmp_path / "log"
    with output.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "pipefleet", "worker", "--ready-file", str(ready), "--threads", "1"],
            env={**os.environ, **settings}, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        until(ready.exists, 60)
        client.redis.lpush("pipefleet.text-classification", "this is no message")
        until(lambda: b"rror" in output.read_bytes(), 20)
        worker.terminate()
        worker.wait(30)
    finally:
        worker.kill()
        worker.wait()
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert {one["pool"] for one in found} == {"texts"}
    assert any(one["message"].startswith("ready: queue pipefleet.text-classification") for one in found)
    assert all(one["worker"].startswith("texts@") for one in found)


HOSTILE = "\x1b[2J\x1b]0;owned\x07\r\n2026-01-01 00:00:00,000 INFO pipefleet: all is well\n\u2028\u0085\u202eevil\x9b31m\ud800\x7f"


class Strange:
    def __str__(self) -> str:
        raise ValueError(HOSTILE)


@pytest.fixture
def text_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What all loggers of a process write that was set up by `configure`; the set-up is undone afterwards."""
    stream, root = StringIO(), logging.getLogger()
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    for place, name in ((threading, "excepthook"), (sys, "excepthook"), (warnings, "showwarning")):
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    logs.configure(stream, pool="texts")
    yield lambda: stream.getvalue().splitlines()
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_process_learns_its_fields_after_its_first_lines(
    text_lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv(logs.VARIABLE, "json")
    logs.configure(stream)
    log.warning("before")
    logs.configure(stream, pool="texts")
    log.warning("after")
    before, after = map(json.loads, stream.getvalue().splitlines())
    assert "pool" not in before
    assert after["pool"] == "texts"


def is_one_plain_line(line: str) -> bool:
    return line.isprintable()


@pytest.mark.parametrize("name", ["pipefleet_workers.x", "celery.worker.consumer", "kombu.pidbox", "somebody.elses"])
def test_no_message_of_any_library_forges_a_line(text_lines: Callable[[], list[str]], name: str) -> None:
    logger = logging.getLogger(name)
    logger.error("Received unregistered task of type %s", HOSTILE)
    logger.error(HOSTILE)
    logger.error("x" * 100_000)
    lines = text_lines()
    assert len(lines) == 3
    assert all(is_one_plain_line(line) and len(line) <= 8_000 for line in lines)
    assert all(f"ERROR {name}: " in line for line in lines)
    assert "\\x1b[2J\\x1b]0;owned\\x07\\r\\n2026-01-01" in lines[0]


@pytest.mark.parametrize("arguments", [("one is missing",), (Strange(), "x")])
def test_arguments_that_make_no_message_end_no_logging(arguments: tuple[Any, ...]) -> None:
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, f"%s %s {HOSTILE}", arguments, None)
    assert is_one_plain_line(LineFormatter("%(message)s").format(record))
    json.loads(JsonFormatter({}).format(record))


def test_a_traceback_is_indented_and_escaped(text_lines: Callable[[], list[str]]) -> None:
    try:
        raise ValueError(HOSTILE + "x" * 100_000)
    except ValueError:
        log.exception("failed")
    first, *others = text_lines()
    assert "ERROR pipefleet_workers.test: failed" in first
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") and is_one_plain_line(line) for line in others)
    assert sum(map(len, others)) < 60_000


def test_warnings_and_errors_that_end_a_thread_are_lines_too(text_lines: Callable[[], list[str]]) -> None:
    def broken() -> None:
        raise ValueError(HOSTILE)

    warnings.warn(HOSTILE, stacklevel=1)
    thread = threading.Thread(target=broken, name=HOSTILE)
    thread.start()
    thread.join()
    lines = text_lines()
    assert all(is_one_plain_line(line) for line in lines)
    assert not any(line.startswith("2026-01-01 00:00:00,000") for line in lines)
    assert any("py.warnings" in line for line in lines)
    assert any("ended" in line and "ERROR" in line for line in lines)


def test_json_lines_stay_json_and_hold_nothing_that_a_terminal_obeys(lines: StringIO) -> None:
    with log_context(job=HOSTILE):
        log.error("%s", HOSTILE, extra={"run": HOSTILE})
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception(HOSTILE)
    first, second = parsed(lines)
    for text in (*map(str, first.values()), *map(str, second.values())):
        assert all(part.isprintable() for part in text.split("\n"))
    assert "\n" not in first["job"] + first["run"]
    lines.getvalue().encode()


def test_a_note_is_not_obeyed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    say(f"pool a ended:\n  {HOSTILE}")
    shown = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in shown)
    assert all(line.startswith("  ") or not line for line in shown[1:])
