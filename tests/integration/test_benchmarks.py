"""The benchmark itself: `make bench-smoke` runs to its end, and its figures are those of real, compared outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.benchmarks import by_hand, processes, report, rounds, summary, trace
from tests.benchmarks.compare import Judge
from tests.benchmarks.contenders import CELERY, HANDS, LITSERVE, SYSTEM
from tests.benchmarks.measurement import Machine, Measurement
from tests.benchmarks.pictures import pictures
from tests.benchmarks.report import ROOT
from tests.benchmarks.smoke import PLAN, complaints
from tests.benchmarks.workloads import WORKLOADS, Workload


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The figures of `make bench-smoke`, which has ended well."""
    target = tmp_path_factory.mktemp("smoke") / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks.smoke", "--json", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(target.read_text())
    return figures


def test_the_outputs_of_all_contenders_agree(smoke: dict[str, Any]) -> None:
    assert {"cpu", "cores", "memory_gib", "gpu", "versions", "settings"} <= set(smoke["machine"])
    assert smoke["machine"]["versions"]["transformers"]
    for section, (count, names) in PLAN.items():
        rows = smoke["sections"][section]["contenders"]
        assert set(rows) == set(names)
        for name, row in rows.items():
            if "missing" not in row:
                [run] = row["runs"]
                assert (run["items"], run["agreement"]) == (count, 1.0), (section, name)
                assert run["seconds"] > 0 < sum(run["cpu"].values()), (section, name)
    assert {name for name, row in smoke["sections"]["trivial"]["contenders"].items() if "missing" in row} <= {
        LITSERVE,
        HANDS,
    }
    assert set(smoke["sections"]["trivial"]["contenders"][SYSTEM]["runs"][0]["cpu"]) == {
        "client",
        "worker",
        "redis",
        "s3",
    }


def test_a_page_is_made_of_measured_figures(smoke: dict[str, Any]) -> None:
    text = report.page([smoke])
    assert "`texts` with 6 items instead of 400: all" in text
    assert "whole system ÷ the limit" in text


def test_wrong_results_are_told_and_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    workload = Workload("w", "text-classification", "", {str(index): "text" for index in range(20)})
    right = {name: [{"label": "A", "score": 0.9}] for name in workload.items}
    wrong = right | {"3": [{"label": "B", "score": 0.9}], "4": [{"label": "A", "score": 0.8}]}
    judge = Judge(workload, lambda: Measurement(2.0, {"process": 1.0}, right))
    able = {CELERY: lambda: judge.judged(CELERY, lambda: Measurement(0.5, {"worker": 1.0}, wrong))}
    record: dict[str, Any] = {"facts": {"usual_items": {}}}
    rounds.measure("w", record, able, 1, lambda: None)
    assert record["contenders"][CELERY]["runs"][0]["agreement"] == 0.9
    assert complaints("w", record) == ["w: celery agrees on 90.0% of 20 items"]
    assert not summary.rows(record)[CELERY].counts
    assert report.faults("texts", record) == [CELERY]


def _fails(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    raise ValueError("a contender of this test")


def _dies(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    os._exit(3)


def _counts(pipe: Any, workload: Workload, numbers: Iterator[int]) -> dict[str, Any]:
    names = list(workload.items)
    return {names[number]: os.getpid() for number in numbers}


def test_processes_share_the_pieces_and_tell_of_their_ends() -> None:
    workload, machine = WORKLOADS["trivial"](200), Machine(threads=1)
    found = processes.run(processes.Task(_counts, workload, 0, machine, pieces=200), 2)
    assert list(found.outputs) == list(workload.items), "each piece once, in the order of the items"
    for run, said in ((_fails, "a contender of this test"), (_dies, "ended without a word")):
        with pytest.raises(RuntimeError, match=said):
            processes.run(processes.Task(run, workload, 0, machine, pieces=1), 2)


def test_pieces_hold_every_name_once_and_the_largest_first() -> None:
    workload = Workload("w", "text-classification", "", {str(size): "x" * size for size in range(1, 500)})
    for count in (1, 2, 16):
        parts = by_hand.pieces(workload, count)
        assert [name for part in parts for name in part] == [str(size) for size in range(499, 0, -1)]
        assert len(parts) in range(count, count * by_hand.PIECES_PER_PROCESS + 1)


def test_pictures_are_the_same_on_every_run_and_of_several_sizes() -> None:
    first = pictures(6, seed=1)
    assert first == pictures(6, seed=1)
    assert list(pictures(3, seed=1).values()) == list(first.values())[:3]
    assert len({len(content) for content in first.values()}) == 6


def test_busy_share_counts_overlapping_forwards_once() -> None:
    spans = [("forward", 1.0, 2.0), ("forward", 1.5, 2.5), ("decode", 0.0, 9.0), ("forward", 3.0, 5.0)]
    events = [trace.Event(stage, "t", start, end, 1) for stage, start, end in spans]
    assert trace.busy_share(events) == pytest.approx(3.5 / 4.0)
    assert trace.busy_share([]) == 0.0


def test_a_trace_is_drawn_with_a_lane_for_each_thread(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {"stage": stage, "thread": thread, "start": start, "end": start + 0.5, "count": 2}
        for stage, thread, start in [("fetch", "fetch-0", 0.1), ("forward", "device", 1.0), ("new & odd", "x<1>", 2.0)]
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "cut off')
    events = trace.read(file, since=0.5)
    assert [event.thread for event in events] == ["device", "x<1>"]
    drawn = ElementTree.fromstring(trace.draw(trace.read(file), "A title"))
    texts = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"A title", "fetch-0", "device", "x<1>", "new & odd"} <= set(texts)
    tips = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert tips == ["fetch, 2 items, 500.0 ms", "forward, 2 items, 500.0 ms", "new & odd, 2 items, 500.0 ms"]
    with pytest.raises(ValueError, match="no events"):
        trace.draw([], "nothing")
