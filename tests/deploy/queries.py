"""Every PromQL query of deploy/: of the rules, and of the dashboard's panels."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tests.deploy.tools import DEPLOY, module

PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "pipefleet.json"
_NAME = re.compile(r"\b(pipefleet[a-z0-9_:]*)\b(?=[{\[ )]|$)")


@dataclass(frozen=True)
class Query:
    """A query and where it stands."""

    where: str
    expr: str

    @property
    def metrics(self) -> set[str]:
        """The names of metrics in it; it has to be valid."""
        module("promql_parser").parse(self.expr)
        return set(_NAME.findall(re.sub(r'"[^"]*"', '""', self.expr)))


def rules() -> list[dict[str, Any]]:
    """Every rule of rules.yml."""
    groups = module("yaml").safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def rule_queries() -> list[Query]:
    """The expression of every rule."""
    return [Query(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]


def panels() -> list[dict[str, Any]]:
    """The graphs of the dashboard."""
    return [one for one in json.loads(DASHBOARD.read_text())["panels"] if one["type"] != "row"]


def panel_queries() -> list[Query]:
    """The queries of every graph, with Grafana's variables filled in for a short time."""
    return [
        Query(
            f"{panel['title']}: {target['legendFormat']}",
            target["expr"].replace("$pool", ".*").replace("$__rate_interval", "10s").replace("[1d:1m]", "[1d:1s]"),
        )
        for panel in panels()
        for target in panel["targets"]
    ]
