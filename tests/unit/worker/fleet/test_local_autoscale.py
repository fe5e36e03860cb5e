"""Who gets the cores of a machine, who is ended first, and what `up --autoscale` says of wrong options."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipefleet import cli
from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority
from pipefleet.fleet.announcements import announced_fleet
from pipefleet.fleet.file import load_fleet
from pipefleet.queues.celery import push_job
from pipefleet_workers.fleet.local.autoscale import Autoscaler, Pace, least_useful, pools_without_maximum, share


def test_a_pool_with_a_maximum_gets_what_it_wants_whatever_the_cores() -> None:
    assert share({"a": 7}, {"a": 100.0}, sharing=set(), cores=2) == {"a": 7}


def test_the_others_share_the_cores_and_none_is_starved() -> None:
    wanted, waits = {"a": 8, "b": 8, "c": 0}, {"a": 10.0, "b": 1000.0, "c": 0.0}
    assert share(wanted, waits, sharing={"a", "b", "c"}, cores=4) == {"a": 1, "b": 3, "c": 0}
    assert share(wanted, waits, sharing={"a", "b", "c"}, cores=1) == {"a": 1, "b": 1, "c": 0}


def test_what_a_maximum_took_is_not_shared() -> None:
    assert share({"a": 3, "b": 5}, {"a": 1.0, "b": 1.0}, sharing={"b"}, cores=4) == {"a": 3, "b": 1}


def test_nobody_gets_more_than_it_wants() -> None:
    assert share({"a": 1, "b": 2}, {"a": 9.0, "b": 1.0}, sharing={"a", "b"}, cores=16) == {"a": 1, "b": 2}


def test_idle_workers_end_first_and_the_youngest_of_them() -> None:
    workers: list[Any] = [SimpleNamespace(number=number, child=SimpleNamespace(pid=number)) for number in (1, 2, 3, 4)]
    assert [one.number for one in least_useful(workers, {1: 5, 4: 2})] == [3, 2, 4, 1]


def test_a_fleet_file_tells_which_pools_named_a_maximum(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text("[pools.a]\n[pools.b]\nworkers = { max = 2 }\n[pools.c.workers]\nmin = 0\n")
    assert pools_without_maximum(path) == {"a", "c"}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--scale-interval 61", "--scale-interval must be at most 60 seconds"),
        ("--scaler-port {taken}", "choose another --scaler-port"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(
    option: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("fleet.toml").write_text('[pools.texts]\ntask = "text-classification"\nmodel = "./model"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = option.format(taken=taken.getsockname()[1]).split()
        code = cli.main(["up", "--autoscale", "--no-flower", "--data", str(tmp_path / "data"), *words])
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert expected in printed.err


def test_it_goes_over_to_another_fleet(client: Client, tmp_path: Path) -> None:
    """A pool that went gets no worker from the reading before, and one that came is read, scaled and announced."""
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text('[pools.texts]\ntask = "text-classification"\nmodel = "/a"\n')
    new.write_text('[pools.pictures]\ntask = "image-classification"\nmodel = "/a"\nworkers = { max = 1 }\n')
    for task in ("text-classification", "image-classification"):
        job = JobMessage(task, task, items=(JobItem("0", "text"),), cost=5.0)
        push_job(client.redis, job, f"pipefleet.{task}", Priority.NORMAL)
    started: list[str] = []
    crew: Any = SimpleNamespace(of=lambda pool: [], start=started.append)
    scaler = Autoscaler(old, load_fleet(old), client.settings, Pace(), crew=crew, port=0)
    try:
        scaler._scaler.tick()
        scaler.follow(new, load_fleet(new))
        scaler.step()
        assert started == []
        scaler._scaler.tick()
        scaler.step()
        assert started == ["pictures"]
        assert list(announced_fleet(client.redis).pools) == ["pictures"]
    finally:
        scaler.service._server.server_close()
