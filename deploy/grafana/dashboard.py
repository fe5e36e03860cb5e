"""Writes dashboards/pipefleet.json: the panels below, laid out three in a row. `python deploy/grafana/dashboard.py`.

`$pool` and `$__rate_interval` are Grafana's; a legend in braces takes labels of the series.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "pipefleet.json"
COLUMNS, WIDTH, HEIGHT = 3, 8, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
POOL = 'pool=~"$pool"'


@dataclass(frozen=True)
class Panel:
    """One graph: its unit (Grafana's name for it), and the queries by legend."""

    title: str
    unit: str
    queries: dict[str, str]
    text: str = ""
    stack: bool = False


def rate(metric: str, by: str, labels: str = "") -> str:
    """The rate of a counter by some labels."""
    return f"sum by ({by}) (rate({metric}{{{POOL}{labels}}}[$__rate_interval]))"


def quantile(q: float, metric: str) -> str:
    """A quantile of a histogram, by pool."""
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', 'le, pool')})"


def pool(metric: str) -> str:
    """A metric of the scaler."""
    return f"pipefleet_pool_{metric}{{{POOL}}}"


ROWS: dict[str, list[Panel]] = {
    "Demand": [
        Panel("Workers", "short", {
            "{{pool}} desired": pool("desired_workers"), "{{pool}} ready": pool("ready_workers"),
            "{{pool}} maximum": pool("max_workers"),
        }, "What the scaler wants, what is there, and what the fleet file allows."),
        Panel("Outstanding work", "s", {"{{pool}}": f"pipefleet:outstanding_seconds{{{POOL}}}"},
              "Device-seconds that wait or are with workers."),
        Panel("Oldest job", "s", {
            "{{pool}}": pool("oldest_age_seconds"), "{{pool}} allowed": pool("wait_slo_seconds"),
        }),
        Panel("Messages", "short", {"{{pool}} {{state}}": pool("messages")},
              "A message is a single job or a shard of a run.", stack=True),
        Panel("Load", "short", {"{{pool}}": pool("load")}, "Work that arrives, in devices that it keeps busy."),
        Panel("Uncertainty of the outstanding work", "percentunit", {"{{pool}}": pool("backlog_error")},
              "Long queues are sampled; this is the relative standard error."),
    ],
    "Throughput": [
        Panel("Items", "ops", {"{{pool}} {{state}}": rate("pipefleet_items_total", "pool, state")}, stack=True),
        Panel("Time by stage", "s", {"{{pool}} {{stage}}": rate("pipefleet_stage_seconds_total", "pool, stage")},
              "Seconds of items in each stage, a second: what is large is what they wait for.", stack=True),
        Panel("Units of a batch", "short", {
            "{{pool}} median": quantile(0.5, "pipefleet_batch_units"),
            "{{pool}} mean": f"{rate('pipefleet_batch_units_sum', 'pool')} / {rate('pipefleet_batch_units_count', 'pool')}",
        }),
        Panel("Seconds of a forward", "s", {
            "{{pool}} median": quantile(0.5, "pipefleet_batch_seconds"),
            "{{pool}} p95": quantile(0.95, "pipefleet_batch_seconds"),
        }),
        Panel("Useful share of a batch", "percentunit", {
            "{{pool}}": rate("pipefleet_batch_cost_total", "pool", ',kind="useful"')
            + " / " + rate("pipefleet_batch_cost_total", "pool", ',kind="padded"'),
        }, "The rest is padding."),
        Panel("What was found out about batching", "short", {
            "{{pool}} {{fact}}": f"max by (pool, fact) (pipefleet_batching{{{POOL}}})",
        }, "Budget, whether padding is exact (1) or equal shapes are stacked (0), and the fit of the service time."),
    ],
    "Devices": [
        Panel("Busy share", "percentunit", {
            "{{pool}} {{instance}}": f"rate(pipefleet_device_busy_seconds_total{{{POOL}}}[$__rate_interval])",
        }, "Of each worker's device."),
        Panel("Idle while work waits", "percentunit", {
            "{{pool}}": f"(1 - pipefleet:device_busy:ratio_rate5m{{{POOL}}}) and on (pool) {pool('queued_seconds')} > 0",
        }),
        Panel("Seconds of a unit of cost", "s", {"{{pool}}": pool("seconds_per_cost")}, "As the scaler measures it."),
    ],
    "Failures": [
        Panel("Failures by code", "ops", {
            "{{pool}} {{code}} in {{stage}}": rate("pipefleet_item_failures_total", "pool, code, stage"),
        }, stack=True),
        Panel("Failing share", "percentunit", {"{{pool}}": f"pipefleet:failed_items:ratio_rate15m{{{POOL}}}"}),
        Panel("Deliveries", "ops", {"{{pool}} {{event}}": rate("pipefleet_messages_total", "pool, event")},
              "Delivered, delivered again after a worker died or lost its lease, and handed back."),
        Panel("Dead letters", "short", {"{{pool}}": pool("dead_letters")}, "Messages that nobody can take, with their reason."),
    ],
    "Cost": [
        Panel("Worker-hours of the last day", "h", {"{{pool}}": f"sum_over_time({pool('ready_workers')}[1d:1m]) / 60"}),
        Panel("Device-seconds of a thousand items", "s", {
            "{{pool}}": "1000 * " + rate("pipefleet_device_busy_seconds_total", "pool")
            + " / " + rate("pipefleet_items_total", "pool"),
        }),
        Panel("Items of a worker-hour", "short", {
            "{{pool}}": f"3600 * {rate('pipefleet_items_total', 'pool')} / on (pool) ({pool('ready_workers')} > 0)",
        }),
    ],
}  # fmt: skip


def panel(one: Panel, number: int, *, x: int, y: int) -> dict[str, Any]:
    """Grafana's JSON of one graph."""
    custom = {"fillOpacity": 20 if one.stack else 0, "stacking": {"mode": "normal" if one.stack else "none"}}
    targets = [
        {"refId": chr(ord("A") + index), "expr": expr, "legendFormat": legend, "datasource": SOURCE}
        for index, (legend, expr) in enumerate(one.queries.items())
    ]
    return {
        "id": number, "type": "timeseries", "title": one.title, "description": one.text, "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT}, "targets": targets,
        "fieldConfig": {"defaults": {"unit": one.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"displayMode": "list"}},
    }  # fmt: skip


def panels() -> list[dict[str, Any]]:
    """Every row and graph, from top to bottom."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        grid = {"x": 0, "y": y, "w": COLUMNS * WIDTH, "h": 1}
        found.append({"id": len(found) + 1, "type": "row", "title": title, "gridPos": grid, "panels": []})
        for index, one in enumerate(row):
            below, right = divmod(index, COLUMNS)
            found.append(panel(one, len(found) + 1, x=right * WIDTH, y=y + 1 + below * HEIGHT))
        y += 1 + -(-len(row) // COLUMNS) * HEIGHT
    return found


def dashboard() -> str:
    """The whole dashboard as JSON text."""
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {
            "name": "pool", "type": "query", "label": "Pool", "datasource": SOURCE, "refresh": 2, "multi": True,
            "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"},
            "query": {"query": "label_values(pipefleet_pool_desired_workers, pool)", "refId": "pools"},
        },
    ]  # fmt: skip
    content = {
        "uid": "pipefleet", "title": "pipefleet", "tags": ["pipefleet"], "schemaVersion": 39, "editable": False,
        "refresh": "30s", "time": {"from": "now-3h", "to": "now"}, "timezone": "browser", "graphTooltip": 1,
        "templating": {"list": variables}, "panels": panels(),
    }  # fmt: skip
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(dashboard(), encoding="utf-8")
