"""A supervisor and stand-ins for its workers: real processes that become ready, end, hang and drain as a folder tells them."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipefleet.cli import main
from pipefleet.errors import UsageError
from pipefleet.fleet.devices import Devices
from pipefleet_workers.fleet.local import supervise as module
from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.part import Yard
from pipefleet_workers.fleet.local.relay import LONGEST, Relay, labelled
from pipefleet_workers.fleet.local.supervise import Supervisor, supervise
from pipefleet_workers.fleet.local.workers import Crew, RelayOf
from tests.servers import until

WORKER = """
import os, pathlib, signal, sys, threading, time
folder, ready = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
name = ready.stem.rpartition("-")[2]
print(f"worker {name} begins with {sys.argv[3:]} and {os.environ.get('PIPEFLEET_WORKER_METRICS_PORT')}", flush=True)
(folder / f"begun-{name}-{os.getpid()}").touch()
ends = folder / f"ends-{name}"
if ends.exists():
    sys.exit(int(ends.read_text()))
def drain(*_):
    if not (folder / "deaf").exists():
        (folder / f"drained-{name}").touch()
        if (folder / "wordy").exists():
            print("x" * 50_000 + f"\\nworker {name} gave everything back", flush=True)
        os._exit(0)
def hurry(*_):
    if not (folder / "stone-deaf").exists():
        os._exit(1)
signal.signal(signal.SIGTERM, drain)
signal.signal(signal.SIGQUIT, hurry)
while (folder / f"slow-{name}").exists():
    time.sleep(0.01)
ready.touch()
threading.Event().wait()
"""
SUPERVISOR = """
import sys
from pathlib import Path
from pipefleet.errors import UsageError
from pipefleet_workers.fleet.local.children import Children
from pipefleet_workers.fleet.local.part import Yard
from pipefleet_workers.fleet.local.supervise import Supervisor, crew_of
folder, code = Path(sys.argv[1]), sys.argv[2]
yard = Yard(folder / "yard", Children(), cwd=folder)
command = lambda pool, ready: [sys.executable, "-S", "-c", code, str(folder), str(ready)]
crew = crew_of(yard, "texts", ("cpu",), 2, command)
try:
    sys.exit(Supervisor(yard, crew, "texts", 2, folder / sys.argv[3]).run())
except UsageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


class World:
    """A supervisor of two workers of one device, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ready = folder / "ready"
        self._log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: str = "ready", **settings: str) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            command = [sys.executable, "-c", SUPERVISOR, str(self.folder), WORKER, ready]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings})
        return self.process

    def start_ready(self, **settings: str) -> subprocess.Popen[bytes]:
        process = self.start(**settings)
        until(self.ready.exists)
        return process

    def pids(self, worker: int) -> list[int]:
        """Every process that worker has had, in any order."""
        return [int(one.name.rpartition("-")[2]) for one in self.folder.glob(f"begun-{worker}-*")]

    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path)
    yield one
    if one.process is not None:
        one.process.kill()
        one.process.wait()


def test_ready_is_when_all_are_and_no_longer_when_one_is_not(world: World) -> None:
    slow = world.folder / "slow-2"
    slow.touch()
    world.ready.write_text("of an earlier process")
    process = world.start()
    until(lambda: (world.folder / "yard" / "run" / "worker-texts-1.ready").exists() and world.pids(2))
    assert not world.ready.exists()
    slow.unlink()
    until(world.ready.exists)
    assert world.ready.read_text() == f"{process.pid}\n"

    (first,), (second,) = world.pids(1), world.pids(2)
    slow.touch()
    os.kill(second, signal.SIGKILL)
    until(lambda: not world.ready.exists())
    until(lambda: len(world.pids(2)) == 2)  # started again, and not ready
    assert not world.ready.exists()
    slow.unlink()
    until(world.ready.exists)
    assert world.pids(1) == [first]
    log = world.log()
    assert "worker-texts-2 on cpu was killed by SIGKILL\n" in log
    assert "worker-texts-2 on cpu: starting it again in 1 s" in log
    assert log.count("all of 2 workers are ready\n") == 3  # twice all, once not


def test_all_drain_together_and_nothing_is_left(world: World) -> None:
    process = world.start_ready()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert all((world.folder / f"drained-{number}").exists() for number in (1, 2))
    assert not world.ready.exists()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_hurries_and_a_third_kills(world: World, first: signal.Signals) -> None:
    (world.folder / "deaf").touch()
    process = world.start_ready()
    process.send_signal(first)
    until(lambda: not world.ready.exists())
    process.send_signal(first)
    assert process.wait(20) == 1
    assert "another signal: the workers get SIGQUIT" in world.log()

    (world.folder / "stone-deaf").touch()
    process = world.start_ready()
    for count in range(1, 4):
        process.send_signal(first)
        if count > 1:
            until(lambda: "the workers get SIGQUIT" in world.log())
        else:
            until(lambda: not world.ready.exists())
    assert process.wait(20) == 128 + signal.SIGKILL


def test_a_worker_that_cannot_start_as_it_was_told_to_ends_all(world: World) -> None:
    (world.folder / "slow-1").touch()
    (world.folder / "ends-2").write_text("2")
    assert world.start().wait(20) == 2
    assert "worker-texts-2 on cpu exited with status 2 before it was ever ready, so all workers end" in world.log()
    assert not world.ready.exists()


def test_a_worker_that_served_and_then_fails_to_start_leaves_the_others_alone(world: World) -> None:
    process = world.start_ready()
    (first,), (second,) = world.pids(1), world.pids(2)
    (world.folder / "ends-2").write_text("2")
    os.kill(second, signal.SIGKILL)
    until(lambda: "exited with status 2" in world.log())
    assert process.poll() is None
    (world.folder / "ends-2").unlink()
    until(world.ready.exists)
    assert world.pids(1) == [first]


def test_a_service_that_is_away_at_the_start_is_waited_for(world: World) -> None:
    (world.folder / "ends-1").write_text("3")
    process = world.start()
    until(lambda: "worker-texts-1 on cpu: starting it again in 1 s" in world.log())
    (world.folder / "ends-1").unlink()
    until(world.ready.exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_hang_up_tries_again_at_once(world: World) -> None:
    (world.folder / "ends-1").write_text("3")
    process = world.start()
    until(lambda: "starting it again in 4 s" in world.log())
    (world.folder / "ends-1").unlink()
    process.send_signal(signal.SIGHUP)
    until(world.ready.exists, 3.0)


def test_one_log_has_the_device_in_front_and_each_worker_a_port_of_its_own(world: World) -> None:
    world.start_ready(PIPEFLEET_WORKER_METRICS_PORT="9400")
    log = world.log()
    assert "[cpu #1] worker 1 begins with ['--device', 'cpu'] and 9400\n" in log
    assert "[cpu #2] worker 2 begins with ['--device', 'cpu'] and 9401\n" in log


def test_a_killed_supervisor_takes_its_workers_with_it(world: World) -> None:
    process = world.start_ready()
    workers = world.pids(1) + world.pids(2)
    process.kill()
    process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.parametrize("place", ["file/ready", "missing/ready", "folder"])
def test_a_ready_file_that_cannot_be_written_is_told_before_anything_starts(world: World, place: str) -> None:
    (world.folder / "file").touch()
    (world.folder / "folder").mkdir()
    process = world.start(ready=place)
    assert process.wait(20) == 2
    assert not world.pids(1)


def test_nobody_who_reads_the_log_stops_no_worker(world: World) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", SUPERVISOR, str(world.folder), WORKER, "ready"]
    world.process = subprocess.Popen(command, stdout=write, stderr=write)
    os.close(write)
    until(world.ready.exists)
    os.close(read)
    (first,) = world.pids(1)
    os.kill(first, signal.SIGKILL)
    until(lambda: len(world.pids(1)) == 2)
    until(world.ready.exists)
    assert world.process.poll() is None
    world.process.send_signal(signal.SIGTERM)
    assert world.process.wait(20) == 0
    assert all((world.folder / f"drained-{number}").exists() for number in (1, 2))


def test_a_stopped_worker_cannot_hold_up_the_third_signal(world: World) -> None:
    process = world.start_ready()
    (first,) = world.pids(1)
    os.kill(first, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    until(lambda: (world.folder / "drained-2").exists())
    process.send_signal(signal.SIGTERM)
    until(lambda: "the workers get SIGQUIT" in world.log())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGKILL


def test_a_ready_file_whose_folder_goes_stops_no_worker(world: World) -> None:
    (world.folder / "place").mkdir()
    slow = world.folder / "slow-1"
    slow.touch()
    process = world.start(ready="place/ready")
    until(lambda: world.pids(1) and world.pids(2))
    (world.folder / "place").rmdir()
    slow.unlink()
    until(lambda: "cannot write --ready-file" in world.log())
    (world.folder / "place").mkdir()
    until((world.folder / "place" / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert world.log().count("cannot write --ready-file") == 1


def full_pipe(world: World) -> tuple[int, int]:
    """A supervisor with ready workers, whose stderr is a pipe that takes no more."""
    (world.folder / "wordy").touch()
    read, write = os.pipe()
    command = [sys.executable, "-c", SUPERVISOR, str(world.folder), WORKER, "ready"]
    with (world.folder / "log").open("wb") as log:
        world.process = subprocess.Popen(command, stdout=log, stderr=write)
    until(world.ready.exists)
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x")
    os.set_blocking(write, True)
    return read, write


def test_a_log_that_takes_no_more_keeps_no_supervisor_from_its_end(world: World) -> None:
    pipe = full_pipe(world)
    assert world.process is not None
    world.process.send_signal(signal.SIGTERM)
    assert world.process.wait(20) == 0
    for end in pipe:
        os.close(end)


def crew(folder: Path, code: str, relay: RelayOf | None = None) -> tuple[Yard, Crew]:
    """Workers that run `code`, and whose pauses pass at once."""
    yard = Yard(folder, Children())
    command = [sys.executable, "-S", "-c", code]
    ticks = itertools.count(0.0, 1000.0)
    one = Crew(
        yard, dict(os.environ), command=lambda pool, ready: command, grace=10.0, clock=lambda: next(ticks), relay=relay
    )
    one.assign("texts", environment={}, devices=("cpu",))
    return yard, one


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(71)", 71), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_workers_that_all_end_again_and_again_end_the_supervisor(tmp_path: Path, code: str, expected: int) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    yard, workers = crew(tmp_path, code)
    assert Supervisor(yard, workers, "texts", 2, None).run() == expected
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == handlers


class SlowReader(io.BytesIO):
    """A log whose reader takes its time."""

    def write(self, line: Any) -> int:
        threading.Event().wait(0.2)
        return super().write(line)


def test_the_last_words_of_drained_workers_are_in_the_log(tmp_path: Path) -> None:
    log = SlowReader()
    code = f"""
import pathlib, signal, sys
def drain(*_):
    print("gave everything back", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
pathlib.Path({str(tmp_path / "begun")!r}).touch()
signal.pause()
"""

    def stop() -> None:
        until((tmp_path / "begun").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    yard, workers = crew(tmp_path, code, lambda worker: Relay("cpu", log, lock=threading.Lock()))
    threading.Thread(target=stop).start()
    assert Supervisor(yard, workers, "texts", 1, None).run() == 0
    assert log.getvalue() == b"[cpu] gave everything back\n"


@pytest.mark.parametrize(("devices", "absent"), [(4, "cuda:2, cuda:3"), (("cuda:1", "cuda:5"), "cuda:5")])
def test_a_host_with_fewer_devices_is_told_before_anything_starts(
    devices: int | tuple[str, ...], absent: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=f"there is no device {absent} here, .* torch sees 2 GPUs"):
        supervise("texts", devices, 1, [], ready_file=None, threads=None, gpus=lambda: 2)
    assert capfd.readouterr().out == ""


def test_a_port_for_each_worker_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEFLEET_WORKER_METRICS_PORT", "65535")
    with pytest.raises(UsageError, match="PIPEFLEET_WORKER_METRICS_PORT must be at most 65534, since 2 workers"):
        supervise("texts", ("cpu",), 2, [], ready_file=None, threads=None)


@pytest.mark.parametrize(
    ("devices", "each", "threads", "variable", "expected"),
    [
        (("cpu",), 2, None, None, ["--threads=4"]),
        (("cpu",), 3, None, None, ["--threads=2"]),
        (("cpu",), 20, None, None, ["--threads=1"]),
        (("cpu",), 1, None, None, []),  # alone it has all of them
        (("cpu",), 2, 7, None, ["--threads=7"]),
        (("cpu",), 2, None, "3", []),
        (2, 2, None, None, []),
    ],
)
def test_workers_on_one_cpu_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, devices: Devices, each: int, threads: int | None, variable: str | None,
    expected: list[str],
) -> None:  # fmt: skip
    commands: list[list[str]] = []

    class Idle(Supervisor):
        def run(self) -> int:
            commands.append(list(self._crew._command("texts", Path("ready"))))
            return 0

    monkeypatch.setattr(module, "Supervisor", Idle)
    monkeypatch.setattr(module, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert supervise("texts", devices, each, ["--pool=x"], ready_file=None, threads=threads, gpus=lambda: 2) == 0
    assert commands == [[sys.executable, "-m", "pipefleet", "worker", "--ready-file=ready", "--pool=x", *expected]]


def test_the_workers_of_the_only_pool_are_told_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def note(pool: str, devices: Devices, per_device: int, options: list[str], **_: Any) -> int:
        told.append((pool, devices, per_device, sorted(options)))
        return 0

    file = tmp_path / "fleet.toml"
    file.write_text('[pools.texts]\ntask = "text-classification"\nmodel = "/models/x"\ndevices = ["cpu"]\n')
    monkeypatch.setattr(module, "supervise", note)
    assert main(["worker", "--fleet", str(file)]) == 0
    assert told == [("texts", ("cpu",), 1, [f"--fleet={file}", "--pool=texts"])]


def test_json_lines_get_a_field_and_other_lines_a_label() -> None:
    line = labelled(b'{"time": "now", "message": "x"}\n', "cuda:0 #2", as_json=True)
    assert json.loads(line) == {"device": "cuda:0 #2", "time": "now", "message": "x"}
    assert labelled(b'{"a": 1}\n', "cpu", as_json=False) == b'[cpu] {"a": 1}\n'
    assert labelled(b"Traceback", "cpu", as_json=True) == b"[cpu] Traceback\n"
    assert labelled(b"{}\n", "cpu", as_json=True) == b"[cpu] {}\n"


def test_a_relay_goes_on_when_nobody_reads_and_keeps_the_last_lines(tmp_path: Path) -> None:
    closed = (tmp_path / "gone").open("wb")
    closed.close()
    relay = Relay("cpu", closed, lock=threading.Lock())
    with os.fdopen(relay.open(), "wb") as output:
        output.write(b"x" * (3 * LONGEST) + b"\n" + b"".join(b"line %d\n" % number for number in range(100)))
    assert relay.last_lines() == [f"line {number}" for number in range(85, 100)]
