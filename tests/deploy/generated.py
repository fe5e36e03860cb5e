"""The files of deploy/ that follow from others there, and how each is made."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

from tests.deploy.tools import DEPLOY

RULES = DEPLOY / "prometheus" / "rules.yml"
HEAD = """\
# `python -m tests.deploy` copies deploy/prometheus/rules.yml to here.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: pipefleet
spec:
"""


def prometheus_rule() -> str:
    """Prometheus' own rules as a resource of the Prometheus operator."""
    return HEAD + indent("groups:" + RULES.read_text().partition("\ngroups:")[2], "  ")


def dashboard() -> str:
    """Grafana's dashboard."""
    return str(runpy.run_path(str(DEPLOY / "grafana" / "dashboard.py"))["dashboard"]())


GENERATED: dict[Path, Callable[[], str]] = {
    DEPLOY / "kubernetes" / "components" / "prometheus-operator" / "rules.yaml": prometheus_rule,
    DEPLOY / "grafana" / "dashboards" / "pipefleet.json": dashboard,
}
