"""The README read as a new user would: its blocks run, in order, in an empty directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipefleet.fleet.file import parse_fleet
from pipefleet_workers.fleet.demo.run import upload_samples
from tests.conftest import Servers
from tests.docs.tables import README, with_task_table

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
ROOT = README.parent


def blocks(language: str) -> list[str]:
    return [body for name, body in BLOCKS if name == language]


def test_every_block_is_of_a_kind_that_is_tested_here() -> None:
    assert {name for name, _ in BLOCKS} == {"sh", "python", "toml", ""}  # "" are drawings


def test_the_table_of_tasks_is_the_one_in_the_code() -> None:
    assert with_task_table(README.read_text()) == README.read_text(), "run `python -m tests.docs`"


def test_make_targets_exist() -> None:
    targets = re.findall(r"\bmake (\w+)", README.read_text())
    assert {"run", "test", "bench", "check"} <= set(targets)
    for target in sorted(set(targets)):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_fleet_files_parse(tmp_path: Path) -> None:
    (tmp_path / "models/all-MiniLM-L6-v2").mkdir(parents=True)
    for body in blocks("toml"):
        fleet = parse_fleet(tomllib.loads(body), base=tmp_path)
        assert set(fleet.pools) == {"speech", "embeddings"}


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (ROOT / target).is_file(), target


@pytest.fixture(scope="module")
def samples(servers: Servers) -> None:
    from pipefleet.storage.store import ObjectStore

    upload_samples(ObjectStore())


@pytest.mark.parametrize("body", blocks("python"))
def test_python_blocks_run(body: str, samples: None, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_shell_commands_run(samples: None, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    (tmp_path / ".env").write_text("")
    lines = [line for body in blocks("sh") for line in body.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("make ", "pipefleet up")):
            continue  # the stack of this session stands for both; `test_demo` and `test_up` run them
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
