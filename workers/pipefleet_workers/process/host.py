"""The devices of this host, counted as torch counts them, without CUDA in this process.

    build of torch ─▶ device files ─▶ NVML and CUDA_VISIBLE_DEVICES ─▶ number of GPUs
                                      where these do not decide: a short child process asks torch

The supervisors of workers and `doctor` call it: with CUDA of its own, a supervisor would take memory of a GPU while it lives.
Nothing is raised; a host that cannot be asked counts as one without GPUs, and the log says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipefleet.fleet.devices import CPU, Devices

log = logging.getLogger(__name__)
MASK = "CUDA_VISIBLE_DEVICES"
ASK_SECONDS = 120.0
"""How long torch may take to be imported and to answer."""
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd")
"""One of these is there wherever a Linux program can use a GPU of torch's: NVIDIA, WSL, Jetson, ROCm."""
Count = Callable[[], int]


def count_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """The number of GPUs that torch would see in a child of this process, as `cuda:0` and so on."""
    build = _torch_build()
    if not any(build.values()) or environment.get(MASK, "0").strip() in ("", "-1"):
        return 0
    if sys.platform == "linux" and not any(map(os.path.exists, _DEVICE_FILES)):
        return 0
    counted = None if build.get("hip") else _masked(_told_by_nvml(), environment.get(MASK))
    return _told_by_torch(environment) if counted is None else counted


visible_gpus: Count = functools.cache(count_gpus)
"""`count_gpus` of this process's environment, asked once."""


def host_devices(devices: Devices, count: Count = visible_gpus) -> tuple[str, ...]:
    """The names of a pool's devices on this host, whether or not they are there; `all` are its GPUs, or its CPU without one."""
    if isinstance(devices, tuple):
        return devices
    number = count() if isinstance(devices, str) else devices
    return tuple(f"cuda:{index}" for index in range(number)) or (CPU,)


def absent_devices(devices: Devices, count: Count = visible_gpus) -> tuple[str, ...]:
    """The GPUs among a pool's devices that this host does not have."""
    wanted = [name for name in host_devices(devices, count) if name.startswith("cuda:")]
    return tuple(name for name in wanted if int(name.partition(":")[2]) >= count())


def _torch_build() -> dict[str, Any]:
    """The versions of CUDA and ROCm that torch was built for, without importing it; both None for a build for CPUs."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return {}
    try:
        content = runpy.run_path(str(Path(found.origin).with_name("version.py")))
    except (OSError, SyntaxError):
        return {"cuda": "unknown"}
    return {name: content.get(name) for name in ("cuda", "hip")}


def _told_by_nvml() -> int | None:
    """The number of GPUs by NVML; None without it, or if one is divided (MIG), which CUDA counts in another way."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return None if any(_is_divided(nvml, one) for one in handles) else len(handles)
    except nvml.NVMLError as error:
        log.debug("NVML does not count the GPUs: %s", error)
        return None


def _is_divided(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:
        return False  # a GPU that cannot be divided


def _masked(count: int | None, mask: str | None) -> int | None:
    """How many of `count` GPUs the mask leaves; None if only CUDA can tell, as for names of GPUs."""
    if count is None or mask is None:
        return count
    indices = [one.strip() for one in mask.split(",")]
    if not all(one.isdecimal() and one.isascii() for one in indices) or len(set(map(int, indices))) < len(indices):
        return None
    # As CUDA reads it: nothing after the first number without a GPU counts.
    return next((place for place, one in enumerate(indices) if int(one) >= count), len(indices))


def _told_by_torch(environment: Mapping[str, str]) -> int:
    command = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        done = subprocess.run(
            command, env=dict(environment), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=ASK_SECONDS, check=True,
        )  # fmt: skip
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        log.warning("torch does not tell how many GPUs there are, so none is used: %s", error)
        return 0
