"""`pipefleet doctor` on the pools of a fleet: who is served, who needs nobody, and what to do about the others."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobItem, JobMessage, Priority, encode_json
from pipefleet.fleet.announcements import announce_pool
from pipefleet.fleet.routing import revision_queue
from pipefleet.queues.celery import push_job
from pipefleet.queues.revision_notes import note_revision
from pipefleet.settings import Settings
from pipefleet_workers.facts import WORKERS_KEY
from pipefleet_workers.fleet.doctor.check import Check
from pipefleet_workers.fleet.doctor.machine import check_pools
from pipefleet_workers.fleet.doctor.pools import pool_checks
from pipefleet_workers.fleet.doctor.report import run_checks
from pipefleet_workers.fleet.local.parked import Parked, tell_parked
from pipefleet_workers.fleet.scaling.service import Scaler

POOLS = ["texts", "speech", "other-speech", "pictures"]
PRODUCER_ONLY = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "numpy", "PIL", "soundfile", "av", "obstore", "orjson"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from pipefleet.cli import main
sys.exit(main(["doctor", "--json"]))
"""


def put(redis: Redis, queue: str, count: int) -> None:
    pipe = redis.pipeline()
    for index in range(count):
        job = JobMessage(f"j{index}", "text-classification", items=(JobItem("0", "text"),), cost=5.0)
        push_job(pipe, job, queue, Priority.NORMAL)
    pipe.execute()


def announce(redis: Redis, pool: str) -> None:
    now = time.time()
    facts = {"pool": pool, "max_cost": 64, "pads": True, "batching": "measured", "at": now, "until": now + 600}
    redis.hset(WORKERS_KEY, f"{pool}@host-1", encode_json(facts))


def checks(client: Client) -> dict[str, Check]:
    return {one.name: one for one in pool_checks(client.settings)}


def test_every_pool_of_the_fleet_file_needs_a_worker(client: Client, redis: Redis) -> None:
    for pool in POOLS[:3]:
        announce(redis, pool)
    found = checks(client)
    assert list(found) == [f"pool {pool}" for pool in POOLS]
    assert [one.ok for one in found.values()] == [True, True, True, False]
    assert found["pool texts"].detail == "1 worker, 0 messages wait"
    assert "start one with `pipefleet worker --pool pictures`" in found["pool pictures"].detail


def test_messages_that_nobody_serves_are_counted(client: Client, redis: Redis) -> None:
    put(redis, "pipefleet.text-classification", 3)
    found = checks(client)["pool texts"]
    assert not found.ok
    assert found.detail.startswith("no worker is alive, 3 messages wait; start one with")


def test_with_a_scaler_a_pool_of_none_is_well_until_work_waits(client: Client, redis: Redis) -> None:
    Scaler(client.fleet, client.settings, cold_start=10.0).tick()
    assert all(one.ok for one in checks(client).values())
    workers = next(one for one in run_checks() if one.name == "workers")
    assert (workers.ok, workers.detail) == (True, "none is alive, and none is needed now")
    put(redis, "pipefleet.text-classification", 1)
    found = checks(client)["pool texts"]
    assert not found.ok
    assert "1 message waits and no worker is alive" in found.detail


def test_without_workers_and_without_a_scaler_workers_are_missing(client: Client) -> None:
    workers = next(one for one in run_checks() if one.name == "workers")
    assert not workers.ok
    assert "no worker is alive" in workers.detail


def test_an_announced_pool_outside_the_file_counts_when_messages_wait_for_it(client: Client, redis: Redis) -> None:
    fields = {"task": "translation", "model": "m", "revision": None, "default": True, "queue": "pipefleet.translation"}
    announce_pool(redis, "words", fields, seconds=60)
    assert "pool words" not in checks(client)
    put(redis, "pipefleet.translation", 2)
    assert not checks(client)["pool words"].ok


def test_a_previous_revision_needs_somebody_only_while_something_waits_for_it(
    client: Client, redis: Redis, tmp_path: Path
) -> None:
    path = tmp_path / "fleet.toml"
    table = '[pools.texts]\ntask = "text-classification"\nmodel = "/new"\n'
    path.write_text(table + 'previous = { model = "/old" }\n')
    settings = client.settings.model_copy(update={"fleet": path})

    def found() -> dict[str, Check]:
        return {one.name: one for one in pool_checks(settings)}

    queue = revision_queue("pipefleet.text-classification", "/old", None)
    assert found()["pool texts@previous"] == Check(
        "pool texts@previous", True, "no worker, and nothing waits for it: it may be taken out of `previous`"
    )
    put(redis, queue, 2)
    note = found()["pool texts@previous"]
    assert (note.ok, note.detail.partition(", or")[0]) == (
        False,
        "no worker is alive, 2 messages wait; start one with `pipefleet worker --pool texts@previous`",
    )
    path.write_text(table)
    note_revision(redis, queue, "/old", None)
    unnamed = found()[f"pool texts@{queue[-8:]}"]
    assert not unnamed.ok
    assert unnamed.detail.startswith("2 messages wait: no worker serves /old for text-classification; start one with")


def test_a_parked_pool_is_told_with_its_cause_and_the_next_step(client: Client, redis: Redis) -> None:
    announce(redis, "texts")
    tell_parked(redis, {"texts": Parked(1, 2, "worker-texts-1 exited with status 1: no such model")})
    found = checks(client)["pool texts"]
    assert not found.ok
    assert found.detail.startswith("1 of 2 workers stay down after ending again and again (worker-texts-1 exited with")
    assert "save the fleet file or send SIGHUP to `pipefleet up`" in found.detail


def test_what_is_wrong_with_redis_is_told_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEFLEET_REDIS_URL", "redis://127.0.0.1:1/0")
    found = {one.name: one for one in run_checks()}
    assert not found["redis"].ok
    assert not found["workers"].ok
    assert not [name for name in found if name.startswith("pool")]


def test_where_only_producers_run_nothing_of_a_worker_is_missing(client: Client, redis: Redis) -> None:
    for pool in POOLS:
        announce(redis, pool)
    done = subprocess.run(
        [sys.executable, "-c", PRODUCER_ONLY], capture_output=True, text=True, timeout=120, check=False
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True), done.stdout
    assert "pip install 'pipefleet[workers]'" in report["checks"][-1]["detail"]
    assert "ModuleNotFoundError" not in done.stdout + done.stderr


def test_the_devices_of_each_pool_are_told_and_those_that_are_missing_here(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    pools = {
        "texts": ("text-classification", 'devices = "all"\nworkers_per_device = 2'),
        "pictures": ("image-classification", "devices = 4"),
        "speech": ("automatic-speech-recognition", 'device = "cuda:7"'),
    }
    tables = [f'[pools.{name}]\ntask = "{task}"\nmodel = "/m"\n{line}\n' for name, (task, line) in pools.items()]
    path.write_text("".join(tables))
    settings = Settings(fleet=path)
    assert check_pools(settings, lambda: 2) == (
        "texts: cuda:0, cuda:1, 2 workers each; WARNING: pictures asks for 4 devices, of which this machine has 2 "
        "(cuda:0, cuda:1); its workers for cuda:2, cuda:3 cannot start here"
    )
    assert check_pools(settings, lambda: 4).endswith("pictures: cuda:0, cuda:1, cuda:2, cuda:3, 1 worker each")
    assert check_pools(settings, lambda: 0).startswith(
        "texts: cpu, 2 workers each; WARNING: pictures asks for 4 devices"
    )
    path.write_text(tables[2])
    assert check_pools(settings, lambda: 0) == "no pool of the fleet file has `devices`"
    path.write_text("devices = 4")
    assert check_pools(settings, lambda: 0) == "the fleet file cannot be read"
