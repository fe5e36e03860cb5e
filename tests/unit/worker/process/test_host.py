"""How many GPUs a host has, counted without CUDA: by NVML under a mask, or by a child that asks torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipefleet.fleet.devices import Devices
from pipefleet_workers.process import host
from pipefleet_workers.process.host import absent_devices, count_gpus, host_devices


class NvmlError(Exception):
    pass


def nvml(count: int, *, divided: int | None = None, broken: bool = False) -> SimpleNamespace:
    def start() -> None:
        if broken:
            raise NvmlError("driver not loaded")

    def mode(index: int) -> list[int]:
        if divided is None:
            raise NvmlError("not supported")
        return [int(index == divided), 0]

    return SimpleNamespace(
        NVMLError=NvmlError, nvmlInit=start, nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetMigMode=mode,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def gpu_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host whose torch speaks CUDA and that has device files; what a child of it would answer is 77."""
    monkeypatch.setattr(host, "_torch_build", lambda: {"cuda": "12.8", "hip": None})
    monkeypatch.setattr(host, "_DEVICE_FILES", ("/dev/null",))
    monkeypatch.setattr(host, "_told_by_torch", lambda environment: 77)
    monkeypatch.setitem(sys.modules, "pynvml", nvml(4))


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (None, 4),
        ("0,1,2,3", 4),
        ("2, 3", 2),
        ("3", 1),
        ("", 0),
        ("-1", 0),
        ("0,9,1", 1),  # CUDA stops at the first that is not there
        ("9", 0),
        ("0,0", 77),  # CUDA's answer to such a mask is its own
        ("GPU-8f2c", 77),
        ("MIG-8f2c", 77),
        ("0,-1", 77),
        ("all", 77),
    ],
)
def test_a_mask_is_respected(mask: str | None, count: int) -> None:
    assert count_gpus({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}) == count


def test_torch_is_asked_where_nvml_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(4, divided=2))
    assert count_gpus({}) == 77
    monkeypatch.setitem(sys.modules, "pynvml", nvml(4, broken=True))
    assert count_gpus({}) == 77
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert count_gpus({}) == 77
    monkeypatch.setitem(sys.modules, "pynvml", nvml(4, divided=7))
    assert count_gpus({}) == 4
    monkeypatch.setattr(host, "_torch_build", lambda: {"cuda": None, "hip": "6.2"})
    assert count_gpus({}) == 77


def test_nothing_is_asked_where_torch_can_use_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_DEVICE_FILES", ("/dev/no-such-file",))
    if sys.platform == "linux":
        assert count_gpus({}) == 0
    monkeypatch.setattr(host, "_DEVICE_FILES", ("/dev/null",))
    monkeypatch.setattr(host, "_torch_build", lambda: {"cuda": None, "hip": None})
    assert count_gpus({}) == 0
    monkeypatch.setattr(host, "_torch_build", dict)
    assert count_gpus({}) == 0


@pytest.mark.parametrize(
    ("devices", "count", "names", "absent"),
    [
        ("all", 2, ("cuda:0", "cuda:1"), ()),
        ("all", 0, ("cpu",), ()),
        (1, 2, ("cuda:0",), ()),
        (3, 2, ("cuda:0", "cuda:1", "cuda:2"), ("cuda:2",)),
        (("cuda:0", "cuda:3"), 2, ("cuda:0", "cuda:3"), ("cuda:3",)),
        (("cpu",), 0, ("cpu",), ()),
        (("mps",), 0, ("mps",), ()),
    ],
)
def test_the_devices_of_a_pool_on_a_host(
    devices: Devices, count: int, names: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    assert host_devices(devices, lambda: count) == names
    assert absent_devices(devices, lambda: count) == absent


def test_the_child_asks_the_real_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    import torch

    assert host._told_by_torch(os.environ) == torch.cuda.device_count()
    assert host._torch_build() == {"cuda": torch.version.cuda, "hip": torch.version.hip}


def test_a_child_that_cannot_tell_counts_for_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    (tmp_path / "torch.py").write_text("raise RuntimeError('broken')")
    assert host._told_by_torch({**os.environ, "PYTHONPATH": str(tmp_path)}) == 0
    assert "torch does not tell how many GPUs there are" in caplog.text
