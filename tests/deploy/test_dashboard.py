"""Every query of the dashboard and the rules, asked of a real Prometheus that scrapes a worker's metrics and a real scaler."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from pipefleet.client import Client
from pipefleet.contract.messages import JobState
from pipefleet.fleet.file import load_fleet
from pipefleet.settings import Settings
from pipefleet_workers.facts import WORKERS_KEY
from pipefleet_workers.fleet.scaling.service import Scaler, ScalerService
from pipefleet_workers.observe.metrics import Metrics
from tests.deploy.processes import free_ports, running, status, wait_for
from tests.deploy.queries import PROMETHEUS, panel_queries, rule_queries
from tests.deploy.tools import DEPLOY, FLEET, module, prometheus_tool

POOL = "embeddings"
SECONDS = 60.0
AWAITED: set[str] = set()
"""Metrics that are asked for here and that nobody has yet."""


class Live:
    """A Prometheus, and the worker's metrics that it scrapes."""

    def __init__(self, url: str, scraped: list[str], metrics: Metrics) -> None:
        self._url = url
        self._scraped = scraped
        self._metrics = metrics

    def names(self) -> set[str]:
        """What the worker and the scaler expose, by name."""
        texts = [urllib.request.urlopen(url, timeout=5).read().decode() for url in self._scraped]
        lines = [line for text in texts for line in text.splitlines() if not line.startswith("#")]
        return {line.partition(" ")[0].partition("{")[0] for line in lines}

    def work(self) -> None:
        """Let the worker do something of every kind."""
        self._metrics.batch(8, padded=100.0, useful=90.0, seconds=0.1)
        self._metrics.processed([{"fetch": 0.01, "forward": 0.1}])
        self._metrics.ended(JobState.SUCCEEDED)
        self._metrics.ended(JobState.FAILED)
        self._metrics.failure(code="killed_worker", stage="forward")
        self._metrics.fact("max_cost", 4096.0)
        for event in ("delivered", "redelivered", "handed_back"):
            self._metrics.message(event)

    def ask(self, expr: str) -> list[Any]:
        """The series that a query finds now. Fails for a query that Prometheus does not take."""
        query = urllib.parse.urlencode({"query": expr})
        with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return list(found["data"]["result"])


@pytest.fixture
def fleet_redis(redis: tuple[Redis, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A fleet with one worker, and a job that waits."""
    client = redis[0]
    kwargs = client.connection_pool.connection_kwargs
    settings = Settings(redis_url=f"redis://:{kwargs['password']}@127.0.0.1:{kwargs['port']}/0", fleet=FLEET)
    client.hset(WORKERS_KEY, "one", json.dumps({"pool": POOL, "until": time.time() + 600}))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unused")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unused")
    with Client(settings) as producer:
        producer.submit("feature-extraction", "a text that waits")
    return settings


@pytest.fixture
def live(fleet_redis: Settings, tmp_path: Path) -> Iterator[Live]:
    metrics = Metrics(POOL)
    worker, own = free_ports(2)
    metrics.serve(worker)
    scaler = Scaler(load_fleet(FLEET), fleet_redis, cold_start=60.0)
    with ExitStack() as stack:
        service = stack.enter_context(ScalerService(scaler, interval=0.5))
        config = _config(tmp_path, worker, service.port)
        command = [
            prometheus_tool("prometheus"), f"--config.file={config}", f"--web.listen-address=127.0.0.1:{own}",
            f"--storage.tsdb.path={tmp_path / 'data'}", "--query.lookback-delta=1m",
        ]  # fmt: skip
        process = stack.enter_context(running(command, cwd=tmp_path, environment={}))
        url = f"http://127.0.0.1:{own}"
        wait_for(lambda: status(f"{url}/-/ready") == 200, process, log=tmp_path / "log")
        yield Live(url, [f"http://127.0.0.1:{port}/metrics" for port in (worker, service.port)], metrics)


def _config(folder: Path, worker: int, scaler: int) -> Path:
    """The configuration of deploy/, with these targets, and quick."""
    shutil.copy(PROMETHEUS / "rules.yml", folder)
    jobs = [f'{{ job_name: {name}, static_configs: [{{ targets: ["127.0.0.1:{port}"] }}] }}'
            for name, port in (("workers", worker), ("scaler", scaler))]  # fmt: skip
    config = folder / "prometheus.yml"
    config.write_text(
        "global: { scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms }\n"
        f"rule_files: [rules.yml]\nscrape_configs: [{', '.join(jobs)}]\n"
    )
    return config


def test_every_query_finds_something_in_a_fleet_at_work(live: Live) -> None:
    """An alert finds nothing while all is well, so of the rules only the syntax and the names count."""
    waiting = {query.where: query for query in panel_queries() if not query.metrics & AWAITED}
    end = time.monotonic() + SECONDS
    while waiting and time.monotonic() < end:
        live.work()
        waiting = {where: query for where, query in waiting.items() if not live.ask(query.expr)}
        time.sleep(0.1)
    assert not waiting, f"these panels show nothing: {sorted(waiting)}"
    recorded = {query.where for query in rule_queries()}
    used = {name for query in rule_queries() + panel_queries() for name in query.metrics}
    assert used - recorded - live.names() == AWAITED
    for query in rule_queries():
        live.ask(query.expr)


def test_a_query_that_is_no_promql_is_refused(live: Live) -> None:
    with pytest.raises(urllib.error.HTTPError):
        live.ask("sum by (pool (up)")


def test_the_scaler_answers_each_autoscaler_with_a_number_and_none_while_it_cannot_see(
    fleet_redis: Settings, redis: tuple[Redis, Any]
) -> None:
    yaml = module("yaml")
    files = (DEPLOY / "kubernetes" / "pools" / "autoscaling").glob("[!k]*.yaml")
    triggers = [yaml.safe_load(file.read_text())["spec"]["triggers"][0]["metadata"] for file in files]
    assert len(triggers) == len(load_fleet(FLEET).pools)
    for settings, expected in ((fleet_redis, 200), (Settings(redis_url="redis://127.0.0.1:1/0"), 503)):
        with ScalerService(Scaler(load_fleet(FLEET), settings, cold_start=60.0), interval=0.2) as service:
            url = f"http://127.0.0.1:{service.port}"
            wait_for(lambda: status(f"{url}/healthz") == expected, redis[1], log=Path(os.devnull))  # noqa: B023
            for trigger in triggers:
                asked = url + urllib.parse.urlsplit(trigger["url"]).path
                assert status(asked) == expected
                if expected == 200:
                    answer = json.load(urllib.request.urlopen(asked, timeout=5))
                    assert isinstance(answer[trigger["valueLocation"]], int)
