"""What SIGHUP does to `pipefleet up`: a reload, unless its terminal has gone."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.fake_crew import until

WAITS = """
import pathlib, sys, time
from pipefleet_workers.fleet.local.command import reload_on_sighup
reload_on_sighup(lambda: pathlib.Path(sys.argv[1], "reloaded").touch())
pathlib.Path(sys.argv[1], "ready").touch()
try:
    while True:
        time.sleep(0.05)  # pause() would miss a signal that comes just before it
except KeyboardInterrupt:
    sys.exit(130)
"""


def _hears_hang_ups() -> None:
    """As in a terminal, also where the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start(folder: Path, terminal: int, *words: str) -> subprocess.Popen[bytes]:
    """The program on a terminal of its own, once it is ready."""
    command = [*words, sys.executable, "-c", WAITS, str(folder)]
    process = subprocess.Popen(
        ["setsid", "--ctty", *command], stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=_hears_hang_ups
    )
    until(lambda: (folder / "ready").exists())
    return process


def test_a_hang_up_by_hand_reloads(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = start(tmp_path, terminal)
    process.send_signal(signal.SIGHUP)
    until(lambda: (tmp_path / "reloaded").exists())
    assert process.poll() is None
    process.kill()
    process.wait()
    os.close(controller)
    os.close(terminal)


@pytest.mark.parametrize(("words", "ends"), [([], True), (["nohup"], False)])
def test_a_terminal_that_goes_ends_it_as_ctrl_c_does_but_not_under_nohup(
    words: list[str], ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # nohup writes there
    controller, terminal = pty.openpty()
    process = start(tmp_path, terminal, *words)
    os.close(terminal)
    os.close(controller)
    if ends:
        assert process.wait(30) == 130
    else:
        until(lambda: (tmp_path / "reloaded").exists())
        assert process.poll() is None
        process.kill()
        process.wait()
    assert (tmp_path / "reloaded").exists() is not ends
