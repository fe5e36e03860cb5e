"""The Compose project as the real Compose reads it, from a copy of the files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.deploy.tools import DEPLOY, ROOT, run, tool

PASSWORDS = {
    line.rstrip("="): f"secret{number}"
    for number, line in enumerate((DEPLOY / ".env.example").read_text().splitlines())
    if line.startswith("PIPEFLEET_")
}
"""One for each that .env.example asks for."""


def copied(folder: Path) -> Path:
    """`folder` with docker-compose.yml and deploy/ in it."""
    shutil.copy(ROOT / "docker-compose.yml", folder)
    shutil.copytree(DEPLOY, folder / "deploy")
    return folder


def compose(
    checkout: Path, *arguments: str, passwords: Mapping[str, str] = PASSWORDS
) -> subprocess.CompletedProcess[str]:
    """Run Compose in `checkout` with these passwords in its .env, and none of this process's environment."""
    (checkout / ".env").write_text("".join(f"{name}={value}\n" for name, value in passwords.items()))
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout)}
    return run([tool("docker-compose"), *arguments], cwd=checkout, environment=environment)


def project(checkout: Path) -> dict[str, Any]:
    """Everything that Compose would start, GPU pools included."""
    done = compose(checkout, "--profile", "gpu", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.replace("$$", "$")))
