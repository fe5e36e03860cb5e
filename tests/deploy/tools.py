"""The programs that validate deploy/, found or fetched. One that is missing is a skip on a laptop and a failure where CI=true."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FLEET = DEPLOY / "fleet.toml"
SECONDS = 120.0


def missing(what: str, how: str) -> NoReturn:
    """Skip the test, or fail it in CI."""
    reason = f"{what} is missing; {how}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def tool(name: str) -> str:
    """The path of a program, of this environment or of PATH."""
    own = Path(sys.prefix, "bin", name)
    found = str(own) if own.is_file() else shutil.which(name)
    return found or missing(name, "pip install 'pipefleet[deploy-lint]'")


def module(name: str) -> ModuleType:
    """A Python module of the `deploy-lint` extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        missing(f"the module {name}", "pip install 'pipefleet[deploy-lint]'")


def prometheus_tool(name: str) -> str:
    """`prometheus` or `promtool`: from PATH, else out of Debian's package, which is fetched once and not installed."""
    if found := shutil.which(name):
        return found
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pipefleet-tools" / "prometheus"
    if not (cache / name).is_file():
        _fetch_prometheus(cache)
    return str(cache / name)


def _fetch_prometheus(cache: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        for command in (["apt-get", "download", "prometheus"], ["sh", "-c", "dpkg-deb -x prometheus_*.deb ."]):
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
            except OSError:
                missing("promtool", "put it on PATH; only Debian's package is fetched by itself")
            if done.returncode:
                missing("promtool", f"put it on PATH, or see why {command[0]} failed: {done.stderr.strip()[-200:]}")
        cache.mkdir(exist_ok=True)
        for name in ("prometheus", "promtool"):
            Path(folder, "usr/bin", name).replace(cache / name)


def run(
    command: Sequence[str | Path], *, cwd: Path = ROOT, environment: Mapping[str, str] | None = None, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end with stdout and stderr captured."""
    return subprocess.run(
        [str(one) for one in command], cwd=cwd, env=environment, input=text, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip


def succeed(command: Sequence[str | Path], *, cwd: Path = ROOT, text: str = "") -> str:
    """The output of a program that has to succeed."""
    done = run(command, cwd=cwd, text=text)
    assert done.returncode == 0, f"{Path(command[0]).name}: {done.stdout}{done.stderr}"
    return done.stdout
