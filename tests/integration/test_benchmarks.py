"""The benchmark's own test: a small workload runs to its end, and the figures are those of real, compared outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.benchmarks import trace
from tests.benchmarks.compare import compare
from tests.benchmarks.contenders import LIMIT, ONE_BY_ONE, ROOT
from tests.benchmarks.measurement import Measurement
from tests.benchmarks.pictures import pictures
from tests.benchmarks.workloads import Workload


def test_a_quick_workload_writes_every_row(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    options = ["texts", "--quick", "--in-process", "--count", "12", "--device", "cpu", "--json", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(target.read_text())
    assert {"cpu", "cores", "gpu", "versions", "settings"} <= set(figures["machine"])
    assert figures["machine"]["versions"]["transformers"]
    rows = figures["texts"]
    assert set(rows) == {ONE_BY_ONE, "pipeline batch_size=32", LIMIT, "pipefleet, in process"}
    for name, row in rows.items():
        assert (row["items"], row["agreement"]) == (12, 1.0), name
        assert 0 < row["lowest"] <= row["items_per_second"] <= row["highest"], name
        assert name in done.stdout
    assert rows[ONE_BY_ONE]["ratio"] == rows[LIMIT]["to_limit"] == 1.0


def test_wrong_results_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    workload = Workload("w", "text-classification", "", {str(index): "text" for index in range(20)})
    right = {name: [{"label": "A", "score": 0.9}] for name in workload.items}
    wrong = right | {"3": [{"label": "B", "score": 0.9}], "4": [{"label": "A", "score": 0.8}]}
    rows = {
        ONE_BY_ONE: lambda: Measurement(2.0, {"process": 1.0}, right),
        LIMIT: lambda: Measurement(1.0, {"process": 1.0}, right),
        "naive Celery": lambda: Measurement(0.5, {"worker": 1.0}, wrong),
        "LitServe": "the package is not installed",
    }
    table = compare(workload, rows, rounds=1)
    assert table["naive Celery"]["agreement"] == 0.9
    assert (table[LIMIT]["ratio"], table[LIMIT]["to_best_peer"]) == (2.0, None)
    assert table["LitServe"] == {"skipped": "the package is not installed"}
    printed = capsys.readouterr().out
    assert "RESULTS DIFFER" in printed
    assert "skipped: the package is not installed" in printed


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
