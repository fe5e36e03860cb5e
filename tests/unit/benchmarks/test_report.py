"""The page and README.md say what the kept figures say, and nothing is lost on the way there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import gpu_results, load, report, tables
from tests.benchmarks.compare import about
from tests.benchmarks.contenders import CELERY, HAND, HANDS, LITSERVE, ONE_BY_ONE, SYSTEM, TITLES
from tests.benchmarks.figures import Figures, UnsuitableFile, read
from tests.unit.benchmarks.records import MACHINE, entry, record, run
from tests.unit.benchmarks.records import load as loaded


def test_the_page_and_the_readme_agree_with_the_kept_figures() -> None:
    entries, again = report.kept(), "run `python -m tests.benchmarks.report`"
    assert report.page(entries) == report.PAGE.read_text(), again
    assert report.with_figures(report.README.read_text(), entries) == report.README.read_text(), again


def test_a_table_has_every_contender_with_spread_and_limit() -> None:
    rows = {
        ONE_BY_ONE: [run(10.0)], HAND: [run(60.0), run(70.0), run(80.0)], HANDS: [run(100.0)],
        SYSTEM: [run(50.0)], LITSERVE: "not installed (pip install it)",
    }  # fmt: skip
    text = tables.workloads({"texts": record(rows)})
    lines = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in reversed(text.splitlines()) if "|" in line
    }
    assert lines[TITLES[HAND]] == "70.0 (60.0-80.0)"
    assert lines[TITLES[HANDS]] == "**100**"
    assert lines[TITLES[LITSERVE]] == "not installed"
    assert lines["whole system ÷ the limit"] == "0.50"
    assert "whole system ÷ the best peer" not in lines
    assert TITLES[CELERY] not in lines
    assert "pip install it" in text


def test_figures_that_are_no_full_figures_say_so() -> None:
    rows = {HAND: [run(60.0, items=10)], SYSTEM: [run(50.0, agreement=0.5)], HANDS: []}
    made = record(rows, rounds=[loaded(), loaded(number=2, foreign=0.8, stolen=0.25)])
    made["contenders"][HANDS]["failures"] = [{"round": 1, "error": "no room"}]
    text = tables.workloads({"texts": made})
    assert "**60.0\\***" in text
    assert "`texts` with 10 items instead of 100" in text
    assert "does not count: 50% agree" in text
    assert "whole system, `texts`: 50.0% of the outputs agree" in text
    assert f"{TITLES[HANDS]}, `texts`: failed in round 1" in text
    assert "Round 2 of `texts` did not have the machine for itself: others used 1.05 of its 2 cores" in text
    assert "0.25 of them other machines on the same host" in text
    assert "Round 1 of" not in text


def test_foreign_load_is_ours_taken_from_all() -> None:
    before, after = load.Ticks(100.0, 50.0, 0.0, 10.0), load.Ticks(110.0, 66.0, 1.0, 22.0)
    found = load.between(before, after, 2)
    assert (found["own_cores"], found["foreign_cores"], found["stolen_cores"]) == (1.2, 0.4, 0.1)
    assert load.is_foreign(found)
    assert not load.is_foreign(load.between(before, load.Ticks(110.0, 62.5, 0.0, 22.0), 2))


def test_the_page_quotes_the_docstrings() -> None:
    text = report.page([entry(texts=record({HAND: [run(60.0)]}))])
    assert all(sentence in text for sentence in about().values())
    assert "It is faster for small models" in text
    assert "| `texts` | 2026-01-02 | abc1234 | 1 | 1.00 | 0.50-1.50 | 0.00 |" in text


def test_every_section_has_its_text() -> None:
    stamp = {"stamp": {"date": "2026-01-02", "commit": ""}, "rounds": [loaded()]}
    single = {"cpu_us_per_job": {"worker": 500.0, "client": 300.0}, "jobs_per_second": 900.0, "latency_p50_ms": 4.0}
    grown = {"items": 500, "first_mib": 100.0, "middle_mib": 110.0, "last_mib": 111.0, "peak_mib": 112.0}
    made = {
        "single": ({SYSTEM: [single | {"latency_p99_ms": 9.0}]}, {"items": 30, "usual": 3000}),
        "worker-memory": ({"worker": [grown]}, {"items": 500, "usual": 500}),
        "simulated": (
            {"device": [{"items": 40, "busy_share": 0.999, "items_per_second": 60.0}]},
            {"items": 40, "usual": 40, "service": "0.005,5e-6"},
        ),
        "memory": ({"10": [{"objects": 10, "peak_mib": 75.8, "seconds": 0.1}]}, {"items": 10, "usual": 10}),
        "start": ({"stack": [{"workers": 2, "seconds": 7.5}, {"workers": 2, "seconds": 8.5}]}, {}),
    }
    sections = {
        name: {**stamp, "facts": facts, "contenders": {key: {"runs": runs} for key, runs in one.items()}}
        for name, (one, facts) in made.items()
    }
    text = report.page([entry(**sections)])
    for words in (
        "pipefleet (\\* usually 3,000) | 900 | 4.00 | 9.00 | 0.80 | 0.50", "500 trivial items has 100 MiB", "busy 99.9%",
        "over 10 at 75.8 MiB (0.10 s)", "after 8.00 (7.50-8.50) s",
    ):  # fmt: skip
        assert words in text
    assert all(report.section(name, sections) in text for name in sections)


def test_a_section_without_a_run_is_left_out() -> None:
    empty = record({SYSTEM: []}) | {"contenders": {SYSTEM: {"runs": [], "failures": [{"round": 1, "error": "x"}]}}}
    text = report.page([entry(single=empty, texts=empty)])
    assert "### Single jobs" not in text
    assert "| failed |" in text
    assert report.faults("single", empty) == [SYSTEM]
    assert report.section("single", {"single": empty}) == "nothing was measured"


def test_files_of_several_machines_are_kept_apart() -> None:
    first, gpu = entry(texts={"a": 1}), entry(texts={"b": 1})
    gpu["machine"] = MACHINE | {"gpu": "H200"}
    entries = report.merged(report.merged([], first), gpu)
    assert [one["machine"]["gpu"] for one in entries] == [None, "H200"]
    entries = report.merged(entries, entry(speech={"c": 1}))
    assert set(entries[0]["sections"]) == {"texts", "speech"}
    newer = entry(speech={"d": 1})
    newer["machine"] = MACHINE | {"versions": {"torch": "3.0"}}
    assert report.merged(entries, newer)[0]["sections"] == {"speech": {"d": 1}}, "versions are never mixed"


def test_tables_of_other_programs_are_written() -> None:
    table = {"title": "On a GPU", "text": "Raw loop and engine.", "head": ["", "items/s"], "rows": [["BERT", "1,000"]]}
    text = report.page([entry() | {"tables": [table]}])
    assert "### On a GPU\n\nRaw loop and engine.\n\n|  | items/s |\n| --- | --- |\n| BERT | 1,000 |" in text


def test_the_readme_says_when_its_figures_are_doubtful() -> None:
    rows = {HAND: [run(60.0)], HANDS: [run(80.0)], SYSTEM: [run(76.0)]}
    good = report.readme_figures([entry(texts=record(rows))])
    assert "| the fastest loop written by hand | 80.0 |" in good
    assert "| pipefleet, from S3 back to S3 | 76.0 |" in good
    assert good.endswith("76.0 |\n")
    made = record(rows | {SYSTEM: [run(76.0, items=9)]}, rounds=[loaded(foreign=1.0)])
    doubtful = report.readme_figures([entry(texts=made)])
    assert "76.0\\* |" in doubtful
    assert "From a few items only. Other programs used the machine meanwhile" in doubtful


def test_results_of_the_gpu_program_become_an_entry(tmp_path: Path) -> None:
    rows = [
        {"row": "raw loop", "items": 2000, "per_second": 1234.5, "busy": 0.981, "note": "random weights"},
        {"row": "engine", "items": 2000, "per_second": 1200.0, "of_raw": 0.97},
    ]
    machine = {
        "device": "NVIDIA H200, 120 of 139 GiB free, CUDA 13.0",
        "cores": "16",
        "Python": "3.12.1",
        "torch": "2.11",
    }
    results = [
        {"name": "device", "part": "check", "rows": [{"row": "machine"}]},
        {"name": "BERT-base, texts", "part": "bench", "rows": rows},
    ]
    made = gpu_results.entry({"machine": machine, "seconds": 1.0, "results": results})
    text = report.page(report.merged([entry()], made))
    assert (
        "## NVIDIA H200, 139 GiB, CUDA 13.0, 16 cores\n\nGPU: NVIDIA H200, 139 GiB, CUDA 13.0. Python 3.12.1, torch 2.11."
        in text
    )
    assert "| row | items | per second | busy | of raw |" in text
    assert "| raw loop | 2,000 | 1,234 | 98.1% | - |" in text
    assert "- raw loop: random weights" in text
    assert "### device" not in text


def test_a_file_is_gone_on_with_on_the_same_machine_only(tmp_path: Path) -> None:
    path, stamp = tmp_path / "figures.json", {"date": "2026-01-02", "commit": "abc1234"}
    figures = Figures.resumed(path, MACHINE)
    figures.section("texts", stamp, {"items": 1}, again=False)["rounds"] = [1]
    figures.save()
    assert Figures.resumed(path, MACHINE).section("texts", stamp, {"items": 1}, again=False)["rounds"] == [1]
    for facts, commit, again in (
        ({"items": 2}, "abc1234", False),
        ({"items": 1}, "f", False),
        ({"items": 1}, "abc1234", True),
    ):
        fresh = Figures.resumed(path, MACHINE).section("texts", stamp | {"commit": commit}, facts, again=again)
        assert "rounds" not in fresh
    with pytest.raises(UnsuitableFile, match="another cores and versions: write to another file"):
        Figures.resumed(path, MACHINE | {"cores": 4, "versions": {}})
    path.write_text('{"layout": 1}')
    with pytest.raises(UnsuitableFile, match="earlier layout"):
        Figures.resumed(path, MACHINE)
    path.write_text("{")
    with pytest.raises(UnsuitableFile, match="cannot be read"):
        read(path)


def test_the_report_refuses_a_foreign_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps([1]))
    assert report.main([str(tmp_path / "other.json")]) == 2
    assert "no file of this benchmark" in capsys.readouterr().err


def test_the_command_line_refuses_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["pictures"], "no section pictures; the sections are texts"),
        (["--contenders", "hand,foot"], "no contender foot; the contenders are one-by-one"),
        (["--rounds", "0"], "0 is not a positive number"),
        (["--json", "a", "--append", "b"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit):
            command.parse(words)
        assert said in capsys.readouterr().err
    assert command.parse(["--in-process"]).sections == ["texts", "images", "speech", "trivial"]
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    assert "Expected on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (99.96, "100"), (99.9, "99.9"), (9.996, "10.0"), (0.1, "0.10"), (0.012, "0.012")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert tables.number(value) == text
