"""The command line as people and scripts use it: real processes, exit codes, JSON, one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest

from pipefleet.storage.store import ObjectStore
from tests.checkpoints.media import image, jpeg_bytes
from tests.conftest import POOLS, Servers, write_fleet


def run(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipefleet", *words],
        env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=180,
    )  # fmt: skip


def test_submit_prints_a_list_in_input_order(servers: Servers) -> None:
    done = run("submit", "text-classification", "one", "two", "--param", "top_k=2", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0
    assert [row["state"] for row in rows] == ["succeeded", "succeeded"]
    assert all(len(row["output"]) == 2 and row["id"] for row in rows)


def test_map_ends_with_one_and_names_the_failures(servers: Servers, store: ObjectStore, prefix: str) -> None:
    store.put(f"{prefix}in/good.jpg", jpeg_bytes(image(50, 50)))
    store.put(f"{prefix}in/bad.jpg", b"nothing")
    done = run("map", "image-classification", f"{prefix}in/", "--output", f"{prefix}out/", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert (document["items"], document["succeeded"], document["failed"]) == (2, 1, 1)
    assert document["uri"] == f"{prefix}out/"
    assert document["failures"] == f"{prefix}out/_run/failures.jsonl"
    assert "bad.jpg\tbad_media" in run("failures", f"{prefix}out/").stdout
    status = run("status", f"{prefix}out/", "--json")
    assert (status.returncode, json.loads(status.stdout)["state"]) == (1, "partial")


def test_submit_says_which_item_failed(servers: Servers, prefix: str) -> None:
    done = run("submit", "image-classification", f"{prefix}nothing.jpg", "--json")
    (row,) = json.loads(done.stdout)
    assert (done.returncode, row["state"], row["error"]["code"]) == (1, "failed", "not_found")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["submit", "text-clasification", "x"], "did you mean 'text-classification'"),
        (["submit", "text-classification", "x", "--model", "org/none"], "served are"),
        (["submit", "text-classification", "x", "--param", "custom_generate=/tmp"], "takes no parameter"),
        (["submit", "image-classification", "http://example.com/a.jpg"], "nothing from the web"),
        (["submit", "image-classification", "no-such-file.jpg"], "no-such-file.jpg"),
        (["map", "text-classification", "s3://pipefleet/none/", "--output", "s3://pipefleet/x/"], "nothing lies under"),
        (["map", "text-classification", "s3://nobucket/none/", "--output", "s3://pipefleet/x/"], "nobucket"),
        (["status", "s3://pipefleet/no-run/"], "there is no run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(servers: Servers, words: list[str], expected: str) -> None:
    done = run(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


@pytest.mark.parametrize(
    ("name", "url", "words"),
    [
        ("PIPEFLEET_REDIS_URL", "redis://:secret@127.0.0.1:1/0", ["submit", "text-classification", "x"]),
        ("PIPEFLEET_REDIS_URL", "redis://:secret@127.0.0.1:1/0", ["queues"]),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", ["map", "text-classification", "s3://pipefleet/x/", "--output", "s3://pipefleet/y/"]),
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1", ["status", "s3://pipefleet/y/"]),
    ],
)  # fmt: skip
def test_an_unreachable_service_is_exit_code_three(servers: Servers, name: str, url: str, words: list[str]) -> None:
    done = run(*words, environment={name: url})
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1:1" in done.stderr
    assert "pipefleet up" in done.stderr
    assert "secret" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_queues_doctor_and_tasks(servers: Servers) -> None:
    rows = json.loads(run("queues", "--json").stdout)
    assert {row["pool"] for row in rows} == set(POOLS)
    report = json.loads(run("doctor", "--json").stdout)
    assert report["ok"], report
    assert len(json.loads(run("tasks", "--json").stdout)) >= 4


def test_flower_lists_the_tasks(servers: Servers) -> None:
    import base64

    run("submit", "text-classification", "for flower")
    flower = servers.stack.flower
    assert flower is not None
    token = base64.b64encode(f"pipefleet:{flower.password}".encode()).decode()
    request = Request(f"{flower.url}tasks", headers={"Authorization": f"Basic {token}"})
    with urlopen(request, timeout=30) as answer:
        assert b"Flower" in answer.read()
    with urlopen(Request(f"{flower.url}metrics"), timeout=30) as answer:
        assert b'task="pipefleet.infer"' in answer.read()


def test_a_fleet_file_with_a_typo_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('[pools.a]\ntask = "text-classification"\nmodle = "x"\n')
    done = run("up", "--fleet", str(path), "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert "pools.a" in done.stderr
    assert "did you mean 'model'" in done.stderr
    path.write_text('[pools.a]\ntask = "text-classification"\nmodel = "org/name"\n')
    done = run("worker", "--fleet", str(path), "--pool", "a")
    assert done.returncode == 2
    assert "revision" in done.stderr


def test_a_wrong_setting_of_workers_is_told_before_anything_starts(servers: Servers, tmp_path: Path) -> None:
    wrong = {"PIPEFLEET_WORKER_LANES": "many"}
    done = run("up", "--fleet", str(servers.fleet), "--data", str(tmp_path / "data"), environment=wrong)
    assert done.returncode == 2
    assert done.stderr.startswith("pipefleet: wrong setting: PIPEFLEET_WORKER_LANES: Input should be ")
    assert not (tmp_path / "data").exists()


def test_a_second_stack_on_the_same_data_is_refused_in_one_line(servers: Servers) -> None:
    done = run("up", "--fleet", str(servers.fleet), "--data", str(servers.stack.data))
    assert done.returncode == 3
    assert str(os.getpid()) in done.stderr
    assert done.stderr.count("\n") == 1


def test_up_serves_until_sigterm_and_leaves_nothing_behind(tmp_path: Path) -> None:
    fleet = write_fleet(tmp_path / "fleet.toml", {"classify": POOLS["classify"]})
    variables = tmp_path / "env"
    command = [
        sys.executable, "-m", "pipefleet", "up", "--fleet", str(fleet), "--data", str(tmp_path / "data"),
        "--env-file", str(variables), "--no-flower",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        stack = psutil.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not variables.exists():
        assert stack.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    environment = dict(line.split("=", 1) for line in variables.read_text().splitlines())
    assert run("submit", "text-classification", "hello", environment=environment).returncode == 0
    children = stack.children(recursive=True)
    assert len(children) >= 3
    stack.send_signal(signal.SIGTERM)
    assert stack.wait(60) == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_the_demo_runs_without_a_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipefleet", "demo", "--data", str(tmp_path / "data")],
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"24 of 24 items", done.stdout)
    assert re.search(r"400 of 400 items", done.stdout)
    assert "\x1b" not in done.stdout + done.stderr
