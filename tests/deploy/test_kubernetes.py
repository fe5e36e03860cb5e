"""deploy/kubernetes: every overlay builds, every resource is valid to the letter, and what refers to something finds it."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipefleet.fleet.file import load_fleet
from tests.deploy.schemas import CUSTOM
from tests.deploy.tools import DEPLOY, FLEET, module, run, succeed, tool

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
SECRETS = {"pipefleet-redis", "pipefleet-s3", "pipefleet-flower", "pipefleet-dev"}
"""What deploy/README.md says how to make."""
Resources = list[dict[str, Any]]


@functools.cache
def built(folder: Path) -> str:
    return succeed([tool("kubectl"), "kustomize", folder])


def resources(text: str) -> Resources:
    return list(module("yaml").safe_load_all(text))


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Name and manifests."""
    return request.param, built(KUBERNETES / "overlays" / request.param)


def invalid(text: str, version: str = "1.37") -> list[str]:
    """What strict validation has against these manifests."""
    return [error for one in resources(text) for error in _errors(one, version)]


def _errors(one: dict[str, Any], version: str) -> list[str]:
    where = f"{one['kind']} {one['metadata']['name']}"
    if one["kind"] in CUSTOM:
        checker = module("jsonschema").Draft202012Validator(CUSTOM[one["kind"]])
        return [f"{where}: {error.json_path}: {error.message}" for error in checker.iter_errors(one)]
    validator = module("kubernetes_validate")
    try:
        validator.validate(one, version, strict=True)
    except (validator.ValidationError, validator.SchemaNotFoundError) as error:
        return [f"{where}: {error}"]
    return []


@pytest.mark.parametrize("version", ["1.34", "1.37"])
def test_every_resource_is_valid(overlay: tuple[str, str], version: str) -> None:
    assert invalid(overlay[1], version) == []


def test_a_resource_that_nothing_can_check_is_an_error() -> None:
    (error,) = invalid("apiVersion: example.com/v1\nkind: Unknown\nmetadata: { name: one }\n")
    assert "Unknown one" in error


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("terminationGracePeriodSeconds:", "terminationGraceSeconds:"),
        ("readOnlyRootFilesystem: true", 'readOnlyRootFilesystem: "yes"'),
        ("maxUnavailable: 25%", "maxUnavailabel: 25%"),
        ("podSelector:", "podselector:"),
        ("cooldownPeriod: 300", "cooldown: 300"),
        ("behavior: currentReplicas", "behavior: keep"),
        ('targetValue: "1"', "targetValue: 1"),
        ("valueLocation: value", "valuelocation: value"),
        ("maxReplicaCount: 4", "maxReplicaCount: 0"),
        ("podMetricsEndpoints:", "podMetricEndpoints:"),
    ],
)
def test_a_broken_resource_is_noticed(before: str, after: str) -> None:
    documents = built(KUBERNETES / "overlays" / "gpu").split("\n---\n")
    whole = next(one for one in documents if before in one)
    assert invalid(whole.replace(before, after, 1))


def test_a_broken_overlay_does_not_build(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    file = tmp_path / "deploy" / "kubernetes" / "overlays" / "gpu" / "kustomization.yaml"
    file.write_text(file.read_text().replace("../../pools", "../../poolz"))
    assert run([tool("kubectl"), "kustomize", file.parent]).returncode != 0


def of(text: str, *kinds: str) -> Resources:
    return [one for one in resources(text) if one["kind"] in kinds]


def workloads(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod template of everything that runs."""
    for one in of(text, "Deployment", "StatefulSet"):
        yield one["metadata"]["name"], one["spec"]["template"]


def test_every_pool_of_the_fleet_file_has_workers_and_a_disruption_budget(overlay: tuple[str, str]) -> None:
    pools = set(load_fleet(FLEET).pools)
    for kind in ("Deployment", "PodDisruptionBudget"):
        names = {one["metadata"]["name"] for one in of(overlay[1], kind)}
        assert {name.removeprefix("pipefleet-worker-") for name in names if "-worker-" in name} == pools
    for name, template in workloads(overlay[1]):
        if "-worker-" in name:
            assert template["spec"]["containers"][0]["args"][2] == name.removeprefix("pipefleet-worker-")


def test_workers_have_longer_than_their_drain_to_stop(overlay: tuple[str, str]) -> None:
    for name, template in workloads(overlay[1]):
        if "-worker-" in name:
            settings = {one["name"]: one["value"] for one in template["spec"]["containers"][0]["env"]}
            drain = float(settings["PIPEFLEET_WORKER_DRAIN_SECONDS"])
            assert template["spec"]["terminationGracePeriodSeconds"] >= drain + 10, name


def test_no_pod_runs_as_root_or_with_rights_it_does_not_need(overlay: tuple[str, str]) -> None:
    for name, template in workloads(overlay[1]):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["resources"]["limits"]["memory"], name
            assert container["readinessProbe"], name


def test_images_are_pinned(overlay: tuple[str, str]) -> None:
    for name, template in workloads(overlay[1]):
        for container in template["spec"]["containers"]:
            assert re.search(r":(?!latest)[\w.-]+$", container["image"]), f"{name}: {container['image']}"


def test_secrets_are_named_and_never_written_down(overlay: tuple[str, str]) -> None:
    assert of(overlay[1], "Secret") == []
    named = set(re.findall(r"secret(?:Key)?Ref:\n(?:\s+key: \S+\n)?\s+name: (\S+)", overlay[1]))
    assert {"pipefleet-redis", "pipefleet-flower"} <= named <= SECRETS
    readme = (DEPLOY / "README.md").read_text()
    assert all(f"create secret generic {name}" in readme for name in named)


def test_config_maps_volumes_and_services_that_are_named_exist(overlay: tuple[str, str]) -> None:
    maps = {one["metadata"]["name"] for one in of(overlay[1], "ConfigMap")}
    claims = {one["metadata"]["name"] for one in of(overlay[1], "PersistentVolumeClaim")}
    for name, template in workloads(overlay[1]):
        for volume in template["spec"].get("volumes", []):
            assert volume.get("configMap", {}).get("name") in maps | {None}, name
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in claims | {None}, name
        for container in template["spec"]["containers"]:
            for source in container.get("envFrom", []):
                assert source.get("configMapRef", {}).get("name") in maps | {None}, name


def test_selectors_select_the_pods_they_are_meant_for(overlay: tuple[str, str]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in workloads(overlay[1])}
    for one in of(overlay[1], "Deployment", "StatefulSet", "Service", "PodDisruptionBudget"):
        selector = one["spec"]["selector"]
        wanted = selector if one["kind"] == "Service" else selector["matchLabels"]
        chosen = [name for name, found in labels.items() if wanted.items() <= found.items()]
        assert chosen == [one["metadata"]["name"]], f"{one['kind']} {one['metadata']['name']}"


def test_every_pod_is_covered_by_a_network_policy(overlay: tuple[str, str]) -> None:
    default = next(one for one in of(overlay[1], "NetworkPolicy") if one["metadata"]["name"] == "pipefleet-default")
    assert default["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in default["spec"]
    for name, template in workloads(overlay[1]):
        assert default["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items(), name


def test_the_autoscaler_asks_the_scaler_for_each_pool() -> None:
    text = built(KUBERNETES / "overlays" / "gpu")
    (service,) = [one for one in of(text, "Service") if one["metadata"]["name"] == "pipefleet-scaler"]
    host = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc:{service['spec']['ports'][0]['port']}"
    deployments = {one["metadata"]["name"] for one in of(text, "Deployment")}
    pools = load_fleet(FLEET).pools
    scaled = {one["metadata"]["name"]: one["spec"] for one in of(text, "ScaledObject")}
    assert set(scaled) == {f"pipefleet-worker-{name}" for name in pools}
    for name, pool in pools.items():
        spec = scaled[f"pipefleet-worker-{name}"]
        assert spec["scaleTargetRef"]["name"] in deployments
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (pool.workers.min, pool.workers.max)
        assert spec["triggers"][0]["metadata"]["url"] == f"http://{host}/pools/{name}"
        assert spec["fallback"]["behavior"] == "currentReplicas"


def test_gpu_pools_get_a_gpu_node_in_one_overlay_and_a_cpu_in_the_other() -> None:
    found = {}
    for name in ("dev", "gpu"):
        spec = dict(workloads(built(KUBERNETES / "overlays" / name)))["pipefleet-worker-speech"]["spec"]
        found[name] = (spec["containers"][0], spec.get("nodeSelector"), spec.get("tolerations"))
    container, node, tolerations = found["gpu"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert node == {"nvidia.com/gpu.present": "true"}
    assert tolerations[0]["key"] == "nvidia.com/gpu"
    container, node, tolerations = found["dev"]
    assert container["image"] == "pipefleet-worker-cpu:local"
    assert container["args"][-1] == "--device=cpu"
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert (node, tolerations) == (None, None)


def test_preloaded_models_are_not_hidden_by_a_volume(tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    file = tmp_path / "kubernetes" / "overlays" / "gpu" / "kustomization.yaml"
    file.write_text(file.read_text().replace("components:\n", "components:\n  - ../../components/preloaded-models\n"))
    text = built(file.parent)
    assert invalid(text) == []
    for name, template in workloads(text):
        if "-worker-" in name:
            container = template["spec"]["containers"][0]
            assert "/models" not in [one["mountPath"] for one in container["volumeMounts"]]
            assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
            assert "models" not in [one["name"] for one in template["spec"]["volumes"]]
