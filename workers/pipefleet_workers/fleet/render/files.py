"""The rendered files: the texts from the templates beside this module, and the differences between a folder and these texts.

`command` calls it: `rendered` turns a fleet file into texts by name, `differences` and `write` compare or write them.
A pool that no container can run raises FleetFileError; a folder that cannot be written raises UsageError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from pipefleet.errors import UsageError
from pipefleet_workers.fleet.render.pools import METRICS_PORT, DeployedPool, RenderOptions, load_pools, require_number

FLEET_FILE = "fleet.toml"
MARK = "# Rendered by `pipefleet render"
"""The first words of a rendered file; only files that begin so are ever removed."""


def rendered(target: str, path: Path, options: RenderOptions) -> dict[str, str]:
    """The files of `target` (`compose` or `kubernetes`) for the fleet file at `path`, by name.

    Raises FleetFileError if the fleet file is wrong, or if no container can run one of its pools.
    """
    pools = load_pools(path)
    if target == "kubernetes":
        for one in pools:
            require_number(one, path)
    copy = f"{MARK} {target}`; change the fleet file and render again.\n{path.read_text(encoding='utf-8')}"
    return {FLEET_FILE: copy, **TARGETS[target](pools, options)}


def differences(wanted: Mapping[str, str], folder: Path) -> list[str]:
    """One sentence for each file of `folder` that is missing, differs from the rendered text, or belongs to a removed pool."""
    found = []
    for name, text in wanted.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{file} is missing")
        elif file.read_text(encoding="utf-8") != text:
            found.append(f"{file} is not what the fleet file renders")
    return found + [f"{file} belongs to no pool of the fleet file" for file in _left_over(wanted, folder)]


def write(wanted: Mapping[str, str], folder: Path) -> None:
    """Write the files and remove rendered files of removed pools. Raises UsageError if this is not possible."""
    try:
        for name, text in wanted.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        for file in _left_over(wanted, folder):
            file.unlink()
    except OSError as error:
        raise UsageError(
            f"cannot write the rendered files to {folder}: {error}; name another folder with --output"
        ) from None


def _left_over(wanted: Mapping[str, str], folder: Path) -> list[Path]:
    known = {folder / name for name in wanted}
    return [
        file
        for file in sorted(folder.rglob("*.yaml"))
        if file not in known and file.read_text(encoding="utf-8").startswith(MARK)
    ]


def _compose(pools: list[DeployedPool], options: RenderOptions) -> dict[str, str]:
    services = (
        _fill("compose-worker.yaml", one, options, extra=_compose_device(one), networks=_compose_names(one))
        for one in pools
    )
    return {"pools.yaml": _template("compose-head.yaml").substitute() + "".join(services)}


def _compose_device(one: DeployedPool) -> str:
    if not one.on_gpu:
        return ""
    chosen = [name.partition(":")[2] for name in one.names] or ([one.gpu] if one.gpu else [])
    number = "all" if one.pool.devices is None else one.gpus or "all"
    which = f"device_ids: {json.dumps(chosen)}" if chosen else f"count: {number}"
    return _template("compose-gpu.yaml").substitute(which=which)


def _compose_names(one: DeployedPool) -> str:
    """The names under which Prometheus finds the ports of a container with several workers."""
    if one.workers == 1:
        return ""
    names = ["workers", *(f"workers-{number}" for number in range(2, one.workers + 1))]
    return _template("compose-names.yaml").substitute(names=", ".join(names))


def _kubernetes(pools: list[DeployedPool], options: RenderOptions) -> dict[str, str]:
    names = [one.name for one in pools]
    found = {
        "kustomization.yaml": _kustomization("kubernetes-pools.yaml", [f"workers/{name}.yaml" for name in names]),
        "autoscaling/kustomization.yaml": _kustomization(
            "kubernetes-autoscaling.yaml", [f"{name}.yaml" for name in names]
        ),
    }
    for one in pools:
        device = _template(f"kubernetes-{_image(one)}.yaml").substitute(_resources(one))
        ports = _kubernetes_ports(one)
        found[f"workers/{one.name}.yaml"] = _fill("kubernetes-worker.yaml", one, options, extra=device, ports=ports)
        found[f"autoscaling/{one.name}.yaml"] = _fill("kubernetes-scaledobject.yaml", one, options)
    return found


def _resources(one: DeployedPool) -> dict[str, object]:
    """CPUs, Gi of memory (to ask for, and at most) and GPUs of a pod; each worker needs its share of the host."""
    cpus, memory, most = (4, 16, 32) if one.on_gpu else (2, 4, 8)
    number = one.workers
    return {"cpus": cpus * number, "memory": memory * number, "most": most * number, "gpus": one.gpus}


def _kubernetes_ports(one: DeployedPool) -> str:
    """The ports of the metrics: a name for each worker, so that the pod monitor finds it."""
    names = ["metrics", *(f"metrics-{number}" for number in range(2, one.workers + 1))]
    return "".join(
        f"\n            - {{ name: {name}, containerPort: {METRICS_PORT + index} }}" for index, name in enumerate(names)
    )


def _kustomization(template: str, names: list[str]) -> str:
    return _template(template).substitute(resources="".join(f"\n  - {name}" for name in names))


def _fill(template: str, one: DeployedPool, options: RenderOptions, **parts: str) -> str:
    arguments = json.dumps(one.arguments("/tmp/ready"))[1:-1]
    return _template(template).substitute(
        pool=one.name, key=one.pool.key, task=one.pool.task, image=_image(one), arguments=arguments, digest=one.digest,
        drain=options.drain, grace=options.grace, namespace=options.namespace, replicas=one.replicas,
        min=one.least, max=one.most, each=one.each, **parts,
    )  # fmt: skip


def _image(one: DeployedPool) -> str:
    return "cuda" if one.on_gpu else "cpu"


def _template(name: str) -> Template:
    return Template((files(__package__) / "templates" / name).read_text(encoding="utf-8"))


TARGETS: Mapping[str, Callable[[list[DeployedPool], RenderOptions], dict[str, str]]] = {
    "compose": _compose,
    "kubernetes": _kubernetes,
}
