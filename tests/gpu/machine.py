"""The first check: the device answers, and what it is."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from tests.gpu.plan import Check, Order

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "vllm")


def _device(order: Order) -> str:
    facts = {"device": _name(order), "cores": str(len(os.sched_getaffinity(0))), "Python": platform.python_version()}
    order.note("machine", **facts, **_versions())
    one = torch.ones(64, 64, device=order.device)
    if float((one @ one).sum()) != 64.0**3:
        raise AssertionError("the device multiplies wrongly")
    return ", ".join([facts["device"], *(f"{name} {number}" for name, number in _versions().items())])


def _name(order: Order) -> str:
    if not order.on_gpu:
        return f"{platform.processor() or platform.machine()} (a rehearsal without a GPU)"
    free, total = torch.cuda.mem_get_info(order.device)
    memory = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return f"{torch.cuda.get_device_name(order.device)}, {memory}, CUDA {torch.version.cuda}"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


CHECK = Check("device", "check", _device, 60.0, quick=True)
