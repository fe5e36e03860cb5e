"""deploy/prometheus and deploy/grafana, without servers: promtool's own checks, rule tests that can fail, a sound dashboard."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.deploy.generated import GENERATED
from tests.deploy.queries import DASHBOARD, PROMETHEUS, panel_queries, panels, rule_queries, rules
from tests.deploy.tools import DEPLOY, module, prometheus_tool, run, succeed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROMETHEUS, tmp_path / "prometheus"))


def test_prometheus_accepts_its_configuration() -> None:
    succeed([prometheus_tool("promtool"), "check", "config", PROMETHEUS / "prometheus.yml"])


def test_every_rule_does_what_its_cases_say() -> None:
    succeed([prometheus_tool("promtool"), "test", "rules", PROMETHEUS / "rules.test.yml"])


def test_every_alert_has_a_case_a_severity_and_a_next_step() -> None:
    tested = set(re.findall(r"alertname: (\w+)\n +exp_alerts", (PROMETHEUS / "rules.test.yml").read_text()))
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert tested == set(alerts)
    for name, rule in alerts.items():
        assert rule["labels"]["severity"] in ("info", "warning", "critical"), name
        assert set(rule["annotations"]) == {"summary", "action"}, name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("pipefleet:oldest_age:slo_ratio > 1\n", "pipefleet:oldest_age:slo_ratio > 2\n"),
        ("for: 5m", "for: 1m"),
        ("absent(pipefleet_pool_desired_workers)", "pipefleet_pool_desired_workers < 0"),
        ("and on (pool) pipefleet_pool_queued_seconds > 60", ""),
        ("avg by (pool)", "sum by (pool)"),
        ("          and on (pool) sum by (pool) (incr", "          or on (pool) sum by (pool) (incr"),
        ("offset 1h", "offset 1s"),
    ],
)  # fmt: skip
def test_a_wrong_rule_fails_its_cases(folder: Path, before: str, after: str) -> None:
    text = (folder / "rules.yml").read_text()
    assert before in text
    (folder / "rules.yml").write_text(text.replace(before, after))
    assert run([prometheus_tool("promtool"), "test", "rules", folder / "rules.test.yml"]).returncode != 0


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("rules.yml", "sum by (pool, state) (rate(", "sum by (pool, state) (rate(("),
        ("rules.yml", "record: pipefleet:items:rate5m", "recrod: pipefleet:items:rate5m"),
        ("prometheus.yml", "scrape_interval", "scrape_intervall"),
        ("prometheus.yml", "rules.yml", "rulez.yml"),
    ],
)
def test_a_broken_file_is_noticed(folder: Path, file: str, before: str, after: str) -> None:
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after, 1))
    assert run([prometheus_tool("promtool"), "check", "config", folder / "prometheus.yml"]).returncode != 0


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_what_follows_from_other_files_is_up_to_date(path: Path) -> None:
    assert path.read_text() == GENERATED[path](), f"{path} is out of date; run `python -m tests.deploy`"


def test_every_query_parses_and_a_broken_one_does_not() -> None:
    queries = rule_queries() + panel_queries()
    assert len(queries) > 40
    assert all(query.metrics for query in queries)
    with pytest.raises(ValueError, match=r"\S"):
        module("promql_parser").parse(queries[0].expr.replace("(", "((", 1))


def test_panels_have_one_place_each() -> None:
    everything = json.loads(DASHBOARD.read_text())["panels"]
    assert len({one["id"] for one in everything}) == len(everything)
    taken = [
        (x, y)
        for one in everything
        for x in range(one["gridPos"]["x"], one["gridPos"]["x"] + one["gridPos"]["w"])
        for y in range(one["gridPos"]["y"], one["gridPos"]["y"] + one["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_rules_name_panels_that_exist() -> None:
    named = {name for rule in rules() for name in re.findall(r'panel "([^"]+)"', str(rule.get("annotations", "")))}
    assert named
    assert named <= {one["title"] for one in panels()}


def test_grafana_is_told_where_prometheus_and_the_dashboard_are() -> None:
    yaml = module("yaml")
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "pipefleet.yaml").read_text())["providers"]
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())["services"]
    assert source["url"] == "http://prometheus:9090"
    mounted = [one.split(":")[1] for one in compose["grafana"]["volumes"]]
    assert provider["options"]["path"] in mounted
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"
