"""deploy/images: what the linter says, and the two scripts that the build runs."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipefleet.errors import FleetFileError
from tests.deploy.tools import DEPLOY, FLEET, ROOT, run, succeed, tool

IMAGES = DEPLOY / "images"
DOCKERFILE = (IMAGES / "Dockerfile").read_text()


def test_the_linter_has_nothing_against_the_dockerfile() -> None:
    assert succeed([tool("hadolint"), IMAGES / "Dockerfile"]) == ""


@pytest.mark.parametrize(
    ("before", "after", "rule"),
    [
        ("FROM python:${PYTHON} AS build\n", "FROM python:latest AS build\n", "DL3007"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ('ENTRYPOINT ["pipefleet"]', "ENTRYPOINT pipefleet", "DL3025"),
        ("groupadd --gid", "sudo groupadd --gid", "DL3004"),
    ],
)
def test_a_broken_dockerfile_is_noticed(before: str, after: str, rule: str) -> None:
    assert before in DOCKERFILE
    done = run([tool("hadolint"), "-"], text=DOCKERFILE.replace(before, after, 1))
    assert done.returncode != 0
    assert rule in done.stdout


def test_every_final_image_runs_as_a_user_without_rights() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)
    final = {stage.split()[2]: stage for stage in stages[1:] if re.search(r" AS (control|cpu|cuda)\n", stage)}
    assert set(final) == {"control", "cpu", "cuda"}
    for name, stage in final.items():
        assert "USER 10001:10001" in stage, name
        assert "USER root" not in stage, name


def test_the_scripts_inside_the_services_pass_the_shell_linter_and_a_broken_one_does_not(
    services: dict[str, Any],
) -> None:
    commands = [one["command"] for one in services.values() if (one["command"] or [""])[0] == "sh"]
    checks = [one["healthcheck"]["test"] for one in services.values() if one["healthcheck"]["test"][0] == "CMD-SHELL"]
    scripts = [command[2] for command in commands] + [check[1] for check in checks]
    assert len(scripts) >= 4
    for script in scripts:
        succeed([tool("shellcheck"), "--shell=sh", "-"], text=script + "\n")
    assert run([tool("shellcheck"), "--shell=sh", "-"], text=scripts[0].replace("END\n", "ENDE\n", 1)).returncode != 0


def test_requirements_of_an_image_come_from_the_project() -> None:
    requirements = runpy.run_path(str(IMAGES / "requirements.py"))["requirements"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    control, workers = (requirements(image, ROOT / "pyproject.toml") for image in ("control", "workers"))
    assert set(project["dependencies"]) < set(control) & set(workers)
    assert set(project["optional-dependencies"]["workers"]) < set(workers)
    assert any(line.startswith("pyarrow") for line in workers)  # a run may ask any worker for parts as Parquet
    names = {re.split(r"[<>=\[]", line)[0] for line in control}
    assert {"flower", "prometheus-client"} <= names
    assert not {"torch", "transformers"} & names
    with pytest.raises(KeyError):
        requirements("other", ROOT / "pyproject.toml")


def test_models_of_the_hub_are_preloaded_at_their_revision(tmp_path: Path) -> None:
    wanted = runpy.run_path(str(IMAGES / "preload.py"), run_name="preload")["wanted"]
    assert {(pool.model, pool.revision) for pool in wanted(FLEET)} == {
        ("sentence-transformers/all-MiniLM-L6-v2", "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"),
        ("openai/whisper-tiny.en", "87c7102498dcde7456f24cfd30239ca606ed9063"),
    }
    unpinned = tmp_path / "fleet.toml"
    unpinned.write_text('[pools.one]\ntask = "feature-extraction"\nmodel = "org/name"\n')
    with pytest.raises(FleetFileError, match="no revision"):
        wanted(unpinned)


def test_what_the_build_reads_is_in_its_context() -> None:
    ignored = (IMAGES / "Dockerfile.dockerignore").read_text().splitlines()
    taken = [line[1:] for line in ignored if line.startswith("!")]
    assert "*" in ignored
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, flags=re.M)
    mounted = re.findall(r"source=(\S+?),target", DOCKERFILE)
    for name in {word for line in copied for word in line.split()} | {one for one in mounted if "/root" not in one}:
        assert (ROOT / name).exists(), name
        assert name in taken or (name.startswith("deploy/images/") and "deploy/images/*.py" in taken), name
