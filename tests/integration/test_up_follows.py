"""`pipefleet up` as a whole, under a fleet file that is edited: real workers come, are replaced and go, and jobs go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipefleet.client import Client
from pipefleet_workers.facts import announced_workers
from pipefleet_workers.local.environment import in_environment
from tests.conftest import write_fleet
from tests.integration.lease_world import until

TEXTS = ("text-classification", "text-classification", "")
TOP_TWO = ("text-classification", "text-classification", "parameters = { top_k = 2 }")
VECTORS = ("feature-extraction", "feature-extraction", "parameters = { truncation = true }")


class Up:
    """A running `pipefleet up` on `fleet.toml` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.fleet, self._log, env = folder / "fleet.toml", folder / "up.log", folder / "env"
        write_fleet(self.fleet, {"texts": TEXTS})
        command = ["up", "--fleet", self.fleet, "--data", folder / "data", "--env-file", env, "--no-flower"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipefleet", *map(str, command)],
                env={**os.environ, "PIPEFLEET_WORKER_WARM_UP": "false", "PIPEFLEET_WORKER_ANNOUNCE_SECONDS": "1"},
                stdout=log, stderr=log,
            )  # fmt: skip
        until(env.exists, 120)
        self.environment = dict(line.split("=", 1) for line in env.read_text().splitlines())

    def said(self, text: str) -> bool:
        """Whether it printed a text."""
        return text in self._log.read_text()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    one = Up(tmp_path)
    try:
        with in_environment(one.environment):
            yield one
    finally:
        one.process.kill()
        one.process.wait()


def test_pools_come_change_and_go_under_a_running_fleet(up: Up) -> None:
    with Client() as client:

        def workers() -> dict[str, list[str]]:
            found: dict[str, list[str]] = {"texts": [], "vectors": []}
            for name, facts in announced_workers(client.redis).items():
                found[facts["pool"]].append(name)
            return found

        assert client.submit("text-classification", "one label").result(60)[0]["label"]
        (first,) = workers()["texts"]

        up.fleet.write_text(up.fleet.read_text().replace("model =", "modle ="))
        until(lambda: up.said("the fleet file is refused, everything goes on as before: "), 60)
        assert workers()["texts"] == [first]

        write_fleet(up.fleet, {"texts": TEXTS, "vectors": VECTORS})
        up.process.send_signal(signal.SIGHUP)
        until(lambda: workers()["vectors"], 120)
        assert workers()["texts"] == [first]
        with Client() as later:
            assert later.submit("feature-extraction", "words").result(60)

        write_fleet(up.fleet, {"texts": TOP_TWO, "vectors": VECTORS})
        until(lambda: workers()["texts"] and first not in workers()["texts"], 120)
        assert len(client.submit("text-classification", "two labels").result(60)) == 2

        write_fleet(up.fleet, {"texts": TOP_TWO})
        until(lambda: not workers()["vectors"], 60)
        assert len(workers()["texts"]) == 1
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(60) == 0
