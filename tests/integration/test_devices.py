"""`pipefleet worker --devices` with real workers on the CPU: one dies and comes back, the other works on, both drain together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipefleet.client import Client
from pipefleet_workers.facts import announced_workers
from pipefleet_workers.fleet.local.environment import in_environment
from pipefleet_workers.fleet.local.stack import Stack
from tests.conftest import write_fleet
from tests.servers import free_port, until

TASK = "text-classification"
SECONDS = 120.0
QUICK = {
    "PIPEFLEET_WORKER_WARM_UP": "false",
    "PIPEFLEET_WORKER_ANNOUNCE_SECONDS": "1",
    "PIPEFLEET_WORKER_LEASE_SECONDS": "2",
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fleet file whose servers run; nobody serves its pools yet."""
    folder = tmp_path_factory.mktemp("devices")
    two = 'devices = ["cpu"]\nworkers_per_device = 2\ndefault = true'
    path = write_fleet(folder / "fleet.toml", {"texts": (TASK, TASK, two)})
    with path.open("a") as file:
        broken = folder / "broken"
        broken.mkdir()
        file.write(f'[pools.broken]\ntask = "{TASK}"\nmodel = "{broken}"\n')
    with Stack(folder / "data", fleet=path, flower=False) as stack, in_environment(stack.environment()):
        yield path


class Host:
    """A supervisor and its workers."""

    def __init__(self, folder: Path, *options: str, **settings: str) -> None:
        self.ready, self._log = folder / "ready", folder / "log"
        command = [sys.executable, "-m", "pipefleet", "worker", "--ready-file", str(self.ready), *options]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **QUICK, **settings}, stdout=log, stderr=log)

    def log(self) -> str:
        return self._log.read_text()

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def until_ready(self) -> None:
        until(lambda: self.ready.exists() or self.process.poll() is not None, SECONDS)
        assert self.process.poll() is None, self.log()


@contextmanager
def host(folder: Path, *options: str, **settings: str) -> Iterator[Host]:
    one = Host(folder, *options, **settings)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def test_a_worker_dies_and_comes_back_while_the_other_works_and_both_drain(fleet: Path, tmp_path: Path) -> None:
    port = free_port(following=1)
    options = ("--pool", "texts", "--devices", "cpu", "--workers-per-device", "2")
    with host(tmp_path, *options, PIPEFLEET_WORKER_METRICS_PORT=str(port)) as one, Client() as client:
        one.until_ready()
        assert len(names := announced_workers(client.redis)) == 2, names
        for served in (port, port + 1):
            with urllib.request.urlopen(f"http://127.0.0.1:{served}/metrics", timeout=10) as answer:
                assert b"pipefleet_" in answer.read()
        victim, other = one.workers()
        victim.kill()
        until(lambda: not one.ready.exists(), 20)
        for number in range(5):
            assert client.submit(TASK, f"text {number}").result(60)[0]["label"]
        assert other.is_running()
        one.until_ready()
        assert {worker.pid for worker in one.workers()} > {other.pid}
        assert len(one.workers()) == 2
        assert client.submit(TASK, "both are there").result(60)

        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
        assert not one.ready.exists()
        assert announced_workers(client.redis).keys() <= {f"texts@{os.uname().nodename}-{victim.pid}"}  # signed off
    lines = one.log().splitlines()
    assert any(line.startswith("[cpu #1] ") and "ready: queue" in line for line in lines)
    assert any(line.startswith("[cpu #2] ") and "ready: queue" in line for line in lines)


def test_the_pool_says_how_many_workers_a_host_has(fleet: Path, tmp_path: Path) -> None:
    with host(tmp_path, "--pool", "texts", PIPEFLEET_LOG="json") as one:
        until(lambda: "2 workers start: worker-texts-1 on cpu, worker-texts-2 on cpu" in one.log(), 60)
        one.until_ready()
        lines = one.log().splitlines()
        assert all(line.startswith("{") for line in lines), lines
        assert any(line.startswith('{"device": "cpu #2", "time"') for line in lines)
        one.process.send_signal(signal.SIGINT)
        assert one.process.wait(60) == 0


def test_a_model_that_does_not_load_ends_all_with_its_code(fleet: Path, tmp_path: Path) -> None:
    with host(tmp_path, "--pool", "broken", "--devices", "all", "--workers-per-device", "2") as one:
        assert one.process.wait(SECONDS) == 2
        assert "exited with status 2 before it was ever ready, so all workers end" in one.log()
        assert not one.ready.exists()


@pytest.mark.parametrize("option", ["--device=cpu", "--devices=cpu", "--devices=9", "--devices=some"])
def test_an_error_before_the_start_is_a_line_of_a_json_log(tmp_path: Path, option: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text('[pools.texts]\ntask = "text-classification"\nmodel = "/nowhere"\n')
    if option == "--device=cpu":
        file.write_text("pools = [")
    command = [sys.executable, "-m", "pipefleet", "worker", "--fleet", str(file), option]
    if option == "--devices=cpu":
        command.append("--pool=another")
    done = subprocess.run(
        command, env={**os.environ, "PIPEFLEET_LOG": "json"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert json.loads(line)["level"] == "ERROR", line


@pytest.mark.parametrize("options", [["--device", "cpu"], ["--devices", "cpu"]])
@pytest.mark.parametrize("value", ["abc", "70000"])
def test_a_wrong_setting_of_workers_is_one_sentence(
    fleet: Path, options: list[str], value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipefleet.cli import main

    monkeypatch.setenv("PIPEFLEET_WORKER_METRICS_PORT", value)
    assert main(["worker", "--pool", "texts", *options]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("pipefleet: wrong setting: PIPEFLEET_WORKER_METRICS_PORT: Input should be ")
    assert captured.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--devices", "gpu"], "--devices names 'gpu', which is no device; write cuda:N, xpu:N, mps or cpu"),
        (["--devices", "0"], '--devices must be "all", a whole number from 1 to 64'),
        (["--devices", "cuda:0,cuda:0"], "--devices names cuda:0 twice"),
        (["--devices", "60", "--pool", "broken"], "there is no device cuda:"),
        (["--devices", "all", "--device", "cpu"], "--device is for one worker; name --devices instead"),
        (["--workers-per-device", "2", "--device", "cpu"], "--device is for one worker; name --devices instead"),
        (["--workers-per-device", "2", "--pool", "broken"], "--workers-per-device needs --devices, or a pool with"),
        (["--devices", "cpu", "--workers-per-device", "0"], "--workers-per-device must be a whole number from 1 to 64"),
        (["--devices", "cpu", "--threads", "0"], "--threads must be a whole number from 1 to 1024"),
        (["--device", "cpu", "--threads", "-3"], "--threads must be a whole number from 1 to 1024"),
    ],
)
def test_options_that_contradict_are_one_sentence(
    fleet: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipefleet.cli import main

    pool = [] if "--pool" in options else ["--pool", "texts"]
    assert main(["worker", *pool, *options]) == 2
    captured = capsys.readouterr().err
    assert sentence in captured
    assert captured.count("\n") == 1
