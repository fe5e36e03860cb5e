"""Logs as JSON: one object a line, with what is known of the job, and exceptions as one field."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from pipefleet.errors import UsageError
from pipefleet_workers import logs
from pipefleet_workers.logs import JsonFormatter, log_context, say
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
