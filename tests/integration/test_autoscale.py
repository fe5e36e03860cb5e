"""`pipefleet up --autoscale` as a whole: a burst takes two pools from no worker to several and back, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipefleet.client import Client
from pipefleet.queues.celery import COST_HEADER
from pipefleet.queues.keys import ledger_keys, queue_lists
from pipefleet.queues.revision_notes import queues_of
from pipefleet_workers.fleet.local.environment import in_environment
from tests.conftest import write_fleet
from tests.servers import until

SLO, COLD_START = 4.0, 4.0
LIMITS = (
    f"max_batch_items = 1\nwait_slo = {SLO}\nparameters = {{ truncation = true }}\nworkers = {{ min = 0, max = %d }}"
)
POOLS = {
    "texts": ("text-classification", "text-classification", LIMITS % 3),
    "vectors": ("feature-extraction", "feature-extraction", LIMITS % 1),
}
QUEUE = "pipefleet.text-classification"
ITEMS, SINGLES = 240, 12
SECONDS_PER_ITEM = 0.1
WORKER = {
    "OMP_NUM_THREADS": "1",
    "PIPEFLEET_WORKER_WARM_UP": "false",
    "PIPEFLEET_WORKER_SIMULATED_DEVICE": f"{SECONDS_PER_ITEM},0",
    "PIPEFLEET_WORKER_SHARDS": "2",
}


class Up:
    """A running `pipefleet up --autoscale`."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "up.log"
        self._env_file = folder / "env"
        fleet = write_fleet(folder / "fleet.toml", POOLS)
        options = ["--scale-interval", "1", "--cold-start", str(COLD_START), "--scale-down-after", "3", "--no-flower"]
        command = ["up", "--fleet", fleet, "--data", folder / "data", "--env-file", self._env_file, "--autoscale"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipefleet", *map(str, command), *options],
                env={**os.environ, **WORKER}, stdout=log, stderr=log,
            )  # fmt: skip
        until(self._env_file.exists, 60)
        self.environment = dict(line.split("=", 1) for line in self._env_file.read_text().splitlines())

    def pool(self, name: str) -> Any:
        """What the scaler says of a pool; None before its first reading."""
        try:
            url = f"{self.environment['PIPEFLEET_SCALER_URL']}/pools/{name}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except OSError:
            return None

    def workers(self, pool: str) -> list[psutil.Process]:
        """The processes of a pool's workers."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                words = child.cmdline()
            except psutil.NoSuchProcess:  # a zombie's, too
                continue
            if "worker" in words and words[words.index("--pool") + 1] == pool:
                found.append(child)
        return found

    def lines(self, pool: str) -> list[str]:
        """What was printed of a pool."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(f"pool {pool}: ")]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    one = Up(tmp_path)
    try:
        with in_environment(one.environment):
            yield one
    finally:
        one.process.kill()
        one.process.wait()


@contextmanager
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def costs(messages: list[bytes]) -> float:
    """What messages cost, from what each says in its header."""
    values = [json.loads(message) for message in messages]
    return sum((one[0] if isinstance(one, list) else one)["headers"][COST_HEADER] for one in values)


def compare_with_a_hand_count(up: Up, client: Client) -> None:
    """While the workers stand still, holding leases: what the scaler reads is what lies there, and its number follows."""
    with stopped(up.workers("texts")):
        since = time.time() + 0.5  # a command that was under way when they were stopped
        pool = until(lambda: (one := up.pool("texts")) and one["read_at"] > since and one)
        lists = [name for queue in queues_of(client.redis, QUEUE) for name in queue_lists(queue)]
        queued = [message for name in lists for message in client.redis.lrange(name, 0, -1)]
        leased = client.redis.hvals(ledger_keys(QUEUE)["unacked_key"])
    assert pool["messages"] == {"queued": len(queued), "leased": len(leased), "delayed": 0}
    assert leased
    each = pool["seconds_per_cost"]
    assert pool["backlog_seconds"]["queued"] == pytest.approx(costs(queued) * each)
    assert pool["backlog_seconds"]["leased"] == pytest.approx(costs(leased) * each)
    assert each > SECONDS_PER_ITEM / 2
    over = sum(pool["backlog_seconds"].values()) - 0.13 * SLO * pool["load"]
    reach = max(2 * COLD_START, 0.9 * SLO - COLD_START / 2 - pool["oldest_age_seconds"] / 2)
    assert pool["wanted"] == pytest.approx(pool["load"] + over / reach)


def test_a_burst_brings_workers_up_from_none_and_down_to_none(up: Up) -> None:
    assert up.workers("texts") == up.workers("vectors") == []
    with Client() as client:
        run = client.map(
            "text-classification", [f"text {number}" for number in range(ITEMS)],
            output="s3://pipefleet/burst/", shard_size=6,
        )  # fmt: skip
        jobs = [client.submit("text-classification", f"single {number}") for number in range(SINGLES)]
        others = [client.submit("feature-extraction", f"single {number}") for number in range(SINGLES)]
        until(lambda: (one := up.pool("texts")) and one["seconds_per_cost"] and one["messages"]["leased"], 90)
        compare_with_a_hand_count(up, client)
        most = until(lambda: len(up.workers("texts")) >= 3, 60)
        assert run.wait(timeout=120).succeeded == ITEMS
        assert all(job.result(60) for job in jobs + others)
        until(lambda: not up.workers("texts") and not up.workers("vectors"), 60)
        rows = list(run.results())
        assert most
        assert sorted(row["id"] for row in rows) == sorted({row["id"] for row in rows})
        assert len(rows) == ITEMS
        left = [key for key in ledger_keys(QUEUE).values() if client.redis.exists(key)]
        assert left == []
        assert client.redis.hgetall("pipefleet:workers") == {}
    assert up.lines("texts")[0].startswith("pool texts: 0 -> 1 worker, ")
    assert "-> 0 workers, no work waits" in up.lines("texts")[-1]
    assert not [line for line in up.log.read_text().splitlines() if "starting it again" in line]
    assert up.stop() == 0
