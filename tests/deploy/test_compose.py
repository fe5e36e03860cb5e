"""docker-compose.yml, read by the real Compose: what it starts, with what, and that nothing starts without passwords."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipefleet.fleet.file import load_fleet
from tests.deploy.project import PASSWORDS, compose, project
from tests.deploy.tools import DEPLOY, FLEET

Edit = Callable[[str], str]


def test_one_command_starts_everything_but_the_gpu_pools(checkout: Path) -> None:
    done = compose(checkout, "config", "--services")
    always = {"redis", "s3", "scaler", "flower", "prometheus", "grafana", "worker-embeddings"}
    assert set(done.stdout.split()) == always
    assert set(project(checkout)["services"]) == always | {"worker-speech"}


def test_every_pool_of_the_fleet_file_is_a_service(checkout: Path) -> None:
    services = project(checkout)["services"]
    commands = {name: one["command"] for name, one in services.items() if name.startswith("worker-")}
    assert {name: command[2] for name, command in commands.items()} == {
        f"worker-{name}": name for name in load_fleet(FLEET).pools
    }


@pytest.mark.parametrize("name", PASSWORDS)
@pytest.mark.parametrize("how", ["unset", "empty"])
def test_nothing_starts_without_a_password(checkout: Path, name: str, how: str) -> None:
    settings = {key: value for key, value in PASSWORDS.items() if key != name} | ({name: ""} if how == "empty" else {})
    done = compose(checkout, "config", "--quiet", passwords=settings)
    assert done.returncode != 0
    assert f"required variable {name} is missing a value: set it in .env, see deploy/.env.example" in done.stderr


def test_the_example_holds_no_default_password() -> None:
    assert len(PASSWORDS) == 5
    assert all(line.endswith("=") for line in (DEPLOY / ".env.example").read_text().splitlines() if line[:1] not in "#")


def test_only_s3_and_the_pages_for_people_are_published_and_on_loopback(checkout: Path) -> None:
    services = project(checkout)["services"]
    ports = {
        name: [(one["host_ip"], one["target"]) for one in entry.get("ports", [])] for name, entry in services.items()
    }
    published = {"redis": 6379, "s3": 8333, "flower": 5555, "prometheus": 9090, "grafana": 3000}
    assert {name: one for name, one in ports.items() if one} == {
        name: [("127.0.0.1", port)] for name, port in published.items()
    }


def test_every_service_says_when_it_is_healthy_and_every_image_is_pinned(checkout: Path) -> None:
    for name, one in project(checkout)["services"].items():
        assert one["healthcheck"]["test"], name
        tag = one["image"].rpartition(":")[2]
        assert tag not in ("", "latest"), name
        assert one["restart"] == "unless-stopped", name
        assert "no-new-privileges:true" in one["security_opt"], name


def test_a_worker_has_longer_than_its_drain_to_stop(checkout: Path) -> None:
    for name, one in project(checkout)["services"].items():
        if name.startswith("worker-"):
            minutes, _, seconds = one["stop_grace_period"].removesuffix("s").partition("m")
            grace = int(minutes) * 60 + int(seconds) if seconds else int(minutes)
            assert grace >= float(one["environment"]["PIPEFLEET_WORKER_DRAIN_SECONDS"]) + 10, name


def test_pools_without_a_gpu_reserve_none(checkout: Path) -> None:
    services = project(checkout)["services"]
    resources = {name: one["deploy"]["resources"] for name, one in services.items() if name.startswith("worker-")}
    reserved = {name: "devices" in one.get("reservations", {}) for name, one in resources.items()}
    assert reserved == {"worker-embeddings": False, "worker-speech": True}
    assert services["worker-speech"]["profiles"] == ["gpu"]


def test_files_that_are_mounted_exist(checkout: Path) -> None:
    for name, one in project(checkout)["services"].items():
        for volume in one.get("volumes", []):
            assert volume["type"] != "bind" or Path(volume["source"]).exists(), f"{name}: {volume['source']}"


def test_what_is_built_is_a_target_of_the_dockerfile(checkout: Path) -> None:
    text = (DEPLOY / "images" / "Dockerfile").read_text()
    for name, one in project(checkout)["services"].items():
        if "build" in one:
            assert f" AS {one['build']['target']}\n" in text, name
            assert one["build"]["dockerfile"] == "deploy/images/Dockerfile"


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("docker-compose.yml", lambda text: text.replace("    image: grafana", "    imaeg: grafana")),
        ("docker-compose.yml", lambda text: text.replace("prometheus: { condition", "prometheuss: { condition")),
        ("docker-compose.yml", lambda text: text.replace("  models:\n", "")),
        ("deploy/compose/workers.yaml", lambda text: text.replace("redis: { condition", "rediss: { condition")),
        ("deploy/compose/pools.yaml", lambda text: text.replace("service: cpu", "service: gpu")),
        ("deploy/compose/pools.yaml", lambda text: text.replace("replicas: 1", "replicas: one")),
    ],
)
def test_a_broken_file_is_noticed(checkout: Path, file: str, edit: Edit) -> None:
    path = checkout / file
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    assert compose(checkout, "--profile", "gpu", "config", "--quiet").returncode != 0
