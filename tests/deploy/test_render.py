"""`pipefleet render`: every pool of the fleet file in every deploy file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipefleet.errors import FleetFileError, UsageError
from pipefleet_workers.fleet.render.command import OUTPUTS, register
from pipefleet_workers.fleet.render.files import differences, rendered, write
from pipefleet_workers.fleet.render.pools import RenderOptions, load_pools
from tests.deploy.project import project
from tests.deploy.tools import DEPLOY, FLEET, ROOT, module

HUB = 'task = "feature-extraction"\nmodel = "org/name"\nrevision = "1"\n'
POOL = f"[pools.one]\n{HUB}"


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(POOL)
    return path


def command(*arguments: str | Path) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    chosen = parser.parse_args([str(one) for one in arguments])
    return int(chosen.run(chosen))


@pytest.mark.parametrize("target", OUTPUTS)
def test_the_files_in_deploy_are_what_the_fleet_file_renders(target: str) -> None:
    assert command("render", target, "--fleet", FLEET, "--output", ROOT / OUTPUTS[target], "--check") == 0


@pytest.mark.parametrize("target", OUTPUTS)
def test_check_names_what_is_missing_changed_or_left_over(
    target: str, fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = ("render", target, "--fleet", fleet, "--output", folder)
    assert command(*arguments, "--check") == 1
    assert "fleet.toml is missing" in capsys.readouterr().err
    assert command(*arguments) == 0
    assert command(*arguments, "--check") == 0

    fleet.write_text(POOL + f"default = true\n[pools.two]\n{HUB}")
    assert command(*arguments, "--check") == 1
    assert "is not what the fleet file renders; run the same command without --check" in capsys.readouterr().err
    command(*arguments)
    fleet.write_text(POOL)
    command(*arguments)
    assert command(*arguments, "--check") == 0


def test_files_of_a_pool_that_is_no_more_go_and_files_of_others_stay(fleet: Path, tmp_path: Path) -> None:
    folder, options = tmp_path / "out", RenderOptions()
    fleet.write_text(POOL.replace("one", "old"))
    write(rendered("kubernetes", fleet, options), folder)
    mine = folder / "workers" / "mine.yaml"
    mine.write_text("kind: ConfigMap\n")
    fleet.write_text(POOL)
    wanted = rendered("kubernetes", fleet, options)
    assert any("old.yaml belongs to no pool" in one for one in differences(wanted, folder))
    write(wanted, folder)
    assert not (folder / "workers" / "old.yaml").exists()
    assert mine.exists()
    assert differences(wanted, folder) == []


def test_only_the_pool_that_changes_gets_new_workers(fleet: Path) -> None:
    def digests(content: str) -> dict[str, str]:
        fleet.write_text(content)
        return {one.pool.name: one.digest for one in load_pools(fleet)}

    two = POOL + f"default = true\n[pools.two]\n{HUB}"
    before = digests(two)
    assert digests(two + "workers = { max = 9 }\nwait_slo = 60\n") == before
    after = digests(two + 'dtype = "float32"\n')
    assert after["one"] == before["one"]
    assert after["two"] != before["two"]
    assert digests(POOL)["one"] != digests(POOL.replace('"1"', '"2"'))["one"]


def test_names_that_yaml_would_take_for_something_else_stay_names(fleet: Path) -> None:
    yaml = module("yaml")
    fleet.write_text(
        "".join(f"[pools.{name}]\n{HUB}default = {flag}\n" for name, flag in (("no", "true"), ("1e3", "false")))
    )
    services = yaml.safe_load(rendered("compose", fleet, RenderOptions())["pools.yaml"])["services"]
    assert [one["command"][2] for one in services.values()] == ["no", "1e3"]
    assert [one["labels"]["pipefleet.pool"] for one in services.values()] == ["no", "1e3"]
    text = rendered("kubernetes", fleet, RenderOptions())["workers/1e3.yaml"]
    assert next(yaml.safe_load_all(text))["metadata"]["labels"]["app.kubernetes.io/instance"] == "1e3"


@pytest.mark.parametrize(
    ("device", "image", "arguments"),
    [("cpu", "cpu", []), ("auto", "cuda", []), ("cuda", "cuda", []), ("cuda:2", "cuda", ["--device", "cuda:0"])],
)
def test_the_device_of_a_pool_chooses_image_and_gpu(fleet: Path, device: str, image: str, arguments: list[str]) -> None:
    yaml = module("yaml")
    fleet.write_text(POOL + f'device = "{device}"\n')
    service = yaml.safe_load(rendered("compose", fleet, RenderOptions())["pools.yaml"])["services"]["worker-one"]
    assert service["extends"]["service"] == image
    assert service["command"][5:] == arguments
    gpus = service["deploy"].get("resources", {}).get("reservations", {}).get("devices", [{}])[0]
    assert gpus.get("device_ids") == (["2"] if arguments else None)
    assert service.get("profiles") == (None if image == "cpu" else ["gpu"])
    deployment = next(yaml.safe_load_all(rendered("kubernetes", fleet, RenderOptions())["workers/one.yaml"]))
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == f"pipefleet-worker-{image}"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (image == "cuda")


@pytest.mark.parametrize(
    ("lines", "gpus", "ids", "arguments", "workers"),
    [
        ("devices = 4", 4, None, [], 4),
        ("devices = 2\nworkers_per_device = 3", 2, None, [], 6),
        ('devices = "all"', -1, None, [], 8),
        ('devices = "all"\nworkers_per_device = 4', -1, None, [], 16),
        ('devices = ["cuda:0", "cuda:2"]', None, ["0", "2"], ["--devices", "2"], 2),
        ('devices = ["cpu"]\nworkers_per_device = 2', None, None, [], 2),
    ],
)
def test_a_container_has_the_devices_of_its_pool_and_prometheus_finds_each_worker(
    checkout: Path, lines: str, gpus: int | None, ids: list[str] | None, arguments: list[str], workers: int
) -> None:
    fleet = checkout / "fleet.toml"
    fleet.write_text(f"{POOL}{lines}\n")
    write(rendered("compose", fleet, RenderOptions()), checkout / "deploy" / "compose")
    service = project(checkout)["services"]["worker-one"]  # as Compose itself understands it
    assert service["command"][5:] == arguments
    reserved = service["deploy"]["resources"].get("reservations", {}).get("devices", [{}])[0]
    assert (reserved.get("count"), reserved.get("device_ids")) == (gpus, ids)
    found = module("yaml").safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (looked_for,) = [one["dns_sd_configs"] for one in found["scrape_configs"] if one["job_name"] == "workers"]
    ports = [one["port"] for one in looked_for if set(one["names"]) & set(service["networks"]["default"]["aliases"])]
    base = int(service["environment"]["PIPEFLEET_WORKER_METRICS_PORT"])
    assert ports == list(range(base, base + workers))


def test_a_pod_has_the_gpus_of_its_pool_and_the_scaler_counts_its_workers(fleet: Path) -> None:
    yaml = module("yaml")
    fleet.write_text(f"{POOL}devices = 4\nworkers_per_device = 2\nworkers = {{ min = 9, max = 30 }}\n")
    found = rendered("kubernetes", fleet, RenderOptions())
    container = next(yaml.safe_load_all(found["workers/one.yaml"]))["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["worker", "--pool", "one", "--ready-file", "/tmp/ready"]  # the pool says the rest
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert container["resources"]["requests"] == {"cpu": "32", "memory": "128Gi"}
    ports = [(one["name"], one["containerPort"]) for one in container["ports"]]
    assert ports == [("metrics", 9400), *((f"metrics-{number}", 9399 + number) for number in range(2, 9))]
    operator = DEPLOY / "kubernetes" / "components" / "prometheus-operator" / "podmonitor.yaml"
    monitored = yaml.safe_load(operator.read_text())["spec"]["podMetricsEndpoints"]
    assert {name for name, _ in ports} <= {one["port"] for one in monitored}
    policies = yaml.safe_load_all((DEPLOY / "kubernetes" / "base" / "networkpolicy.yaml").read_text())
    (open_to,) = [one["spec"]["ingress"] for one in policies if one["metadata"]["name"] == "pipefleet-metrics"]
    assert all(open_to[0]["ports"][0]["port"] <= port <= open_to[0]["ports"][0]["endPort"] for _, port in ports)

    scaled = yaml.safe_load(found["autoscaling/one.yaml"])["spec"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (2, 3)
    assert scaled["triggers"][0]["metadata"]["targetValue"] == "8"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('devices = "all"', "a pod gets a number of GPUs, neither all nor chosen ones; write devices = N"),
        ('devices = ["cuda:1"]', "a pod gets a number of GPUs, neither all nor chosen ones; write devices = N"),
        ('devices = ["mps"]', "the images have no mps; use auto, cpu or cuda:N"),
        ("devices = 8\nworkers_per_device = 3", "a container has at most 16 workers, not 24"),
        ('devices = "all"\nworkers_per_device = 20', "a container has at most 16 workers, not 20"),
    ],
)
def test_devices_that_no_pod_can_have_are_refused(fleet: Path, lines: str, message: str) -> None:
    fleet.write_text(f"{POOL}{lines}\n")
    with pytest.raises(FleetFileError, match=f"{fleet}: pools.one: .*{message}"):
        rendered("kubernetes", fleet, RenderOptions())


def test_workers_of_the_cpu_share_one_pod(fleet: Path) -> None:
    fleet.write_text(f'{POOL}devices = ["cpu"]\nworkers_per_device = 2\n')
    text = rendered("kubernetes", fleet, RenderOptions())["workers/one.yaml"]
    container = next(module("yaml").safe_load_all(text))["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == "pipefleet-worker-cpu"
    assert container["resources"]["requests"]["cpu"] == "4"
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_the_grace_period_follows_from_the_drain(fleet: Path) -> None:
    yaml = module("yaml")
    options = RenderOptions(drain=20)
    service = yaml.safe_load(rendered("compose", fleet, options)["pools.yaml"])["services"]["worker-one"]
    assert service["environment"]["PIPEFLEET_WORKER_DRAIN_SECONDS"] == "20"
    assert service["stop_grace_period"] == "35s"
    spec = next(yaml.safe_load_all(rendered("kubernetes", fleet, options)["workers/one.yaml"]))["spec"]["template"][
        "spec"
    ]
    assert spec["terminationGracePeriodSeconds"] == 35
    assert {"name": "PIPEFLEET_WORKER_DRAIN_SECONDS", "value": "20"} in spec["containers"][0]["env"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POOL + "workers = { min = 0, max = 0 }\n", "pools.one.workers must be whole numbers with 0 <= min <= max and max >= 1"),
        (POOL + f"default = true\n[pools.two]\n{HUB}default = true\n", "are all the default of feature-extraction; keep one"),
        (POOL + f"[pools.two]\n{HUB}", "mark one of them with default = true"),
        (POOL.replace("feature-extraction", "feature-extractoin"), "feature-extraction"),
        (POOL.replace("revision", "revison"), "did you mean 'revision'"),
        (POOL + 'device = "mps"\n', "the images have no mps; use auto, cpu or cuda:N"),
        (POOL.replace("org/name", "./model"), "the folder './model' of this machine is not in the image"),
        (POOL.replace("[pools.one]", f"[pools.{'a' * 47}]"), "has at most 46 characters"),
        (POOL.replace("[pools.one]", "[pools.one-]"), "no '-' at its end"),
        ("", "it describes no pool"),
    ],
)  # fmt: skip
def test_a_fleet_that_cannot_be_deployed_is_refused_in_one_sentence(fleet: Path, content: str, message: str) -> None:
    fleet.write_text(content)
    with pytest.raises(FleetFileError, match="^" + str(fleet)) as caught:
        rendered("kubernetes", fleet, RenderOptions())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_folder_that_is_mounted_is_named_by_its_absolute_path(fleet: Path) -> None:
    fleet.write_text(POOL.replace("org/name", "/models/mine"))
    assert load_pools(fleet)[0].pool.model == "/models/mine"


@pytest.mark.parametrize("wrong", [{"drain": -1}, {"namespace": "Not A Name"}])
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"--drain|--namespace"):
        RenderOptions(**wrong)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_is_one_sentence(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="name another folder with --output"):
        write(rendered("compose", fleet, RenderOptions()), tmp_path / "file")


def test_a_revision_that_a_pool_leaves_is_deployed_beside_it(fleet: Path) -> None:
    before = rendered("kubernetes", fleet, RenderOptions())
    fleet.write_text(f'{POOL}previous = {{ model = "org/name", revision = "0" }}\nworkers = {{ min = 2, max = 5 }}\n')
    found = rendered("kubernetes", fleet, RenderOptions())
    worker, scaled = found["workers/one-previous.yaml"], found["autoscaling/one-previous.yaml"]
    assert "name: pipefleet-worker-one-previous" in worker
    assert '"--pool", "one@previous"' in worker
    assert "/pools/one@previous" in scaled
    assert "minReplicaCount: 0" in scaled
    assert "maxReplicaCount: 5" in scaled
    assert "workers/one-previous.yaml" in found["kustomization.yaml"]
    assert found["workers/one.yaml"] == before["workers/one.yaml"], (
        "the workers of the new revision start anew for nothing"
    )
    compose = rendered("compose", fleet, RenderOptions())["pools.yaml"]
    assert "worker-one-previous:" in compose
    assert '"--pool", "one@previous"' in compose


def test_a_revision_is_not_deployed_under_the_name_of_another_pool(fleet: Path) -> None:
    other = '[pools.one-previous]\ntask = "text-classification"\nmodel = "org/other"\nrevision = "1"\n'
    fleet.write_text(f'{POOL}previous = {{ model = "org/name", revision = "0" }}\n{other}')
    with pytest.raises(FleetFileError, match="would be deployed as one-previous"):
        load_pools(fleet)
