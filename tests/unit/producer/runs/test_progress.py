"""Progress as lines on a pipe and as a bar on a terminal, both on stderr."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from pipefleet.runs import progress as module
from pipefleet.runs.progress import describe, show_progress
from pipefleet.runs.run import RunProgress


def at(done: int, *, failed: int = 0, state: str = "running", items: int = 100, seconds: float = 10.0) -> RunProgress:
    return RunProgress("s3://out/", state, items, done - failed, failed, 4, 1, seconds)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_how_far_how_fast_and_what_failed() -> None:
    assert describe(at(40)) == "40/100 items, 4.0 items/s, 10 s, running"
    assert describe(at(40, failed=3)) == "40/100 items, 3 failed, 4.0 items/s, 10 s, running"
    assert describe(at(0, state="planning", seconds=0.0)) == "0/100+ items, 1/4 shards, 0.0 items/s, 0 s, planning"


def test_a_line_says_what_is_in_the_way() -> None:
    refused = replace(at(40), refused=2, refused_reason="no\x1b pyarrow", waiting="nobody serves it")
    assert describe(refused).endswith("running; 2 shards were refused: no\\x1b pyarrow; nobody serves it")
    assert RunProgress.from_json("s3://out/", {**refused.to_json(), "later": 1}) == refused
    assert "refused_reason" not in at(40).to_json()


@pytest.mark.parametrize("state", ["succeeded", "partial", "failed", "cancelled"])
def test_four_states_are_the_end(state: str) -> None:
    assert at(1, state=state).ended
    assert not at(1, state="running").ended
    assert not at(1, state="planning").ended


def test_on_a_pipe_changes_are_lines_without_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    with show_progress(enabled=True, stream=stream) as show:
        for done in (0, 0, 10, 10, 100):
            show(at(done))
        show(at(100, state="succeeded"))
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["0/100", "10/100", "100/100", "100/100"]
    assert lines[-1].endswith("succeeded")
    assert "\x1b" not in stream.getvalue()


def test_on_a_pipe_lines_are_rare_but_the_end_is_always_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 3600.0)
    stream = io.StringIO()
    with show_progress(enabled=True, stream=stream) as show:
        for done in range(100):
            show(at(done))
        show(at(100, state="partial", failed=2))
    assert len(stream.getvalue().splitlines()) == 2
    assert "2 failed" in stream.getvalue()


def test_on_a_pipe_what_gets_in_the_way_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_SECONDS", 3600.0)
    stream = io.StringIO()
    with show_progress(enabled=True, stream=stream) as show:
        for waiting in (None, None, "nobody serves it", "nobody serves it"):
            show(replace(at(0), waiting=waiting))
    assert len(stream.getvalue().splitlines()) == 2


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    with show_progress(enabled=True, stream=stream) as show:
        show(at(40, failed=3))
        show(at(100, state="succeeded"))
    assert "100/100" in stream.getvalue()
    assert "succeeded" in stream.getvalue()


def test_without_progress_nothing_is_written() -> None:
    stream = Terminal()
    with show_progress(enabled=False, stream=stream) as show:
        show(at(100, state="succeeded"))
    assert stream.getvalue() == ""
