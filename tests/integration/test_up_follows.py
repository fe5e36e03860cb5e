"""`pipefleet up` as a whole, under a fleet file that is edited: real workers come, are replaced and go, and jobs go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipefleet.cli import main
from pipefleet.client import Client
from pipefleet.fleet.routing import revision_queue
from pipefleet.settings import load_settings
from pipefleet_workers.facts import announced_workers
from pipefleet_workers.fleet.doctor.pools import pool_checks
from pipefleet_workers.fleet.local.environment import in_environment
from tests.checkpoints import cached
from tests.conftest import write_fleet
from tests.servers import until

TEXTS = ("text-classification", "text-classification", "")
TOP_TWO = ("text-classification", "text-classification", "parameters = { top_k = 2 }")
VECTORS = ("feature-extraction", "feature-extraction", "parameters = { truncation = true }")
TASK = "text-classification"
ITEMS, SHARD = 80, 4
SLOW = {
    "PIPEFLEET_WORKER_SIMULATED_DEVICE": "0.05,0",
    "PIPEFLEET_WORKER_SHARDS": "1",
    "PIPEFLEET_WORKER_ANNOUNCE_SECONDS": "2",
}


class Up:
    """A running `pipefleet up` on `fleet.toml` of a folder."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.fleet, self._log, env = folder / "fleet.toml", folder / "up.log", folder / "env"
        command = ["up", "--fleet", self.fleet, "--data", folder / "data", "--env-file", env, "--no-flower"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipefleet", *map(str, command)],
                env={**os.environ, "PIPEFLEET_WORKER_WARM_UP": "false", "PIPEFLEET_WORKER_ANNOUNCE_SECONDS": "1", **settings},
                stdout=log, stderr=log,
            )  # fmt: skip
        until(env.exists, 120)
        self.environment = dict(line.split("=", 1) for line in env.read_text().splitlines())

    def said(self, text: str) -> bool:
        """Whether it printed a text."""
        return text in self._log.read_text()


@contextmanager
def running(folder: Path, **settings: str) -> Iterator[Up]:
    """A running `pipefleet up`, whose settings are in this process's environment."""
    one = Up(folder, **settings)
    try:
        with in_environment(one.environment):
            yield one
    finally:
        one.process.kill()
        one.process.wait()


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    write_fleet(tmp_path / "fleet.toml", {"texts": TEXTS})
    with running(tmp_path) as one:
        yield one


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


class Traffic:
    """One job after the other from a client, while the block runs; `models` tells who answered the last ones."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self.models: list[str] = []
        self.wrong: Exception | None = None

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def _send(self) -> None:
        try:
            while not self._ending.is_set():
                self.models.append(model_of(self._client.submit(TASK, "a word").result(60)))
        except Exception as error:  # noqa: BLE001 - the test tells
            self.wrong = error

    def goes_to(self, model: str, jobs: int = 5) -> bool:
        """Whether so many jobs in a row were answered by a model."""
        assert self.wrong is None, self.wrong
        return self.models[-jobs:] == [model] * jobs


def model_of(output: list[dict[str, object]]) -> str:
    """Which of the two checkpoints answered: their labels begin with their name."""
    return str(output[0]["label"]).partition(" ")[0]


def named_checkpoint(folder: Path) -> Path:
    """A copy of the tiny checkpoint whose labels begin with the name of `folder`."""
    shutil.copytree(cached(TASK), folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {number: f"{folder.name} {label}" for number, label in config["id2label"].items()}
    config["label2id"] = {label: int(number) for number, label in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_roll_out_and_a_roll_back_under_traffic_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (named_checkpoint(tmp_path / name) for name in ("old", "new"))
    table = f'[pools.texts]\ntask = "{TASK}"\nmodel = "./%s"\nmax_batch_items = 1\n'
    (tmp_path / "fleet.toml").write_text(table % "old")
    queues = {model.name: revision_queue(f"pipefleet.{TASK}", str(model), None) for model in (old, new)}
    texts = [f"text {number}" for number in range(ITEMS)]

    with (
        running(tmp_path, **SLOW) as up,
        Client() as reader,
        Client(load_settings().model_copy(update={"fleet": None})) as listener,
    ):
        assert reader.settings.fleet_path == up.fleet
        assert listener.settings.fleet_path is None

        def serving() -> Counter[str]:
            return Counter(facts["queue"] for facts in announced_workers(reader.redis).values())

        with Traffic(reader) as by_file, Traffic(listener) as by_word:

            def all_go_to(model: str) -> bool:
                return by_file.goes_to(model) and by_word.goes_to(model)

            until(lambda: all_go_to("old"), 60)
            run = reader.map(TASK, texts, output="s3://pipefleet/first/", shard_size=SHARD)
            until(lambda: run.progress().succeeded, 60)
            up.fleet.write_text(table % "new")
            until(lambda: all_go_to("new"), 90)

            up.fleet.write_text(table % "old")
            until(lambda: all_go_to("old"), 60)
            until(lambda: serving() == {queues["old"]: 1}, 60)
            assert run.wait(timeout=60).succeeded == ITEMS
            assert {model_of(row["output"]) for row in run.results()} == {"old"}

            run = reader.map(TASK, texts[: ITEMS // 2], output="s3://pipefleet/second/", shard_size=SHARD)
            up.fleet.write_text(table % "new" + 'previous = { model = "./old" }\n')
            until(lambda: all_go_to("new"), 90)
            assert run.wait(timeout=60).succeeded == ITEMS // 2
            assert {model_of(row["output"]) for row in run.results()} == {"old"}
            until(lambda: serving() == {queues["old"]: 1, queues["new"]: 1}, 60)
            for client in (reader, listener):
                assert model_of(client.submit(TASK, "a word", model=str(old)).result(60)) == "old"
            assert {"pool texts", "pool texts@previous"} <= {one.name for one in pool_checks(load_settings()) if one.ok}
            for words in (["top", "--json"], ["queues"]):
                assert main(words) == 0
                assert "texts@previous" in capsys.readouterr().out
        assert not up.said("starting it again")
        assert by_file.wrong is by_word.wrong is None
