"""Strict JSON schemas of the custom resources that deploy/ uses: only the fields it uses, so that a misspelt one is noticed."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?$"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def table(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object", "additionalProperties": False,
        "required": list(required), "properties": required | optional,
    }  # fmt: skip


def rows(of: Schema) -> Schema:
    """A list with at least one of these."""
    return {"type": "array", "minItems": 1, "items": of}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    """A namespaced resource."""
    metadata = table({"name": TEXT, "namespace": TEXT}, labels=LABELS, annotations=LABELS)
    return table({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


_POLICY = table(
    {"type": {"enum": ["Pods", "Percent"]}, "value": {"type": "integer", "minimum": 1}, "periodSeconds": COUNT}
)
_RULES = table(
    {"policies": rows(_POLICY)},
    stabilizationWindowSeconds=COUNT,
    selectPolicy={"enum": ["Max", "Min", "Disabled"]},
)
_BEHAVIOURS = ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]
_METRICS_API = table({"url": TEXT, "valueLocation": TEXT, "targetValue": NUMBER}, activationTargetValue=NUMBER)
_RULE = table(
    {"expr": TEXT}, alert=TEXT, record=TEXT, labels=LABELS, annotations=LABELS,
    **{"for": {"type": "string", "pattern": r"^\d+[smhd]$"}},
)  # fmt: skip

SCALED_OBJECT = resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    table(
        {
            "scaleTargetRef": table({"name": TEXT}),
            "minReplicaCount": COUNT,
            "maxReplicaCount": {"type": "integer", "minimum": 1},
            "triggers": rows(
                table(
                    {"type": {"const": "metrics-api"}, "metadata": _METRICS_API},
                    metricType={"enum": ["AverageValue", "Value"]},
                )
            ),
        },
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        fallback=table({"failureThreshold": COUNT, "replicas": COUNT}, behavior={"enum": _BEHAVIOURS}),
        advanced=table(
            {"horizontalPodAutoscalerConfig": table({"behavior": table({}, scaleUp=_RULES, scaleDown=_RULES)})}
        ),
    ),
)
POD_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "PodMonitor",
    table(
        {
            "selector": table({}, matchLabels=LABELS, matchExpressions=rows({"type": "object"})),
            "podMetricsEndpoints": rows(table({"port": TEXT}, interval=TEXT)),
        }
    ),
)
PROMETHEUS_RULE = resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    table({"groups": rows(table({"name": TEXT, "rules": rows(_RULE)}, interval=TEXT))}),
)
CUSTOM = {"ScaledObject": SCALED_OBJECT, "PodMonitor": POD_MONITOR, "PrometheusRule": PROMETHEUS_RULE}
