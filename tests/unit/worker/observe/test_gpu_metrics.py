"""GPU gauges, with an NVML that is made up: what it tells is scraped, what it does not tell is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipefleet_workers.observe.gpus import watch_gpus
from pipefleet_workers.observe.metrics import Metrics


class NVMLError(Exception):
    pass


class Nvml:
    """Two GPUs; `broken` are functions that the driver refuses."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *broken: str) -> None:
        self._broken = broken
        self.busy = {"GPU-a": 80, "GPU-b": 0}

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "_broken"):
            raise NVMLError("not supported")
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        return

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=self.busy[handle], memory=1)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=10 << 30, total=80 << 30)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 312_500


def value(metrics: Metrics, name: str, gpu: str) -> float | None:
    return metrics.registry.get_sample_value(f"pipefleet_gpu_{name}", {"pool": "texts", "gpu": gpu})


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("texts")


def test_every_gauge_of_every_gpu(metrics: Metrics) -> None:
    nvml = Nvml()
    assert watch_gpus(metrics, "texts", ["GPU-a", "GPU-b"], nvml)
    assert [value(metrics, "utilisation", gpu) for gpu in ("GPU-a", "GPU-b")] == [0.8, 0.0]
    assert value(metrics, "memory_used_bytes", "GPU-a") == 10 << 30
    assert value(metrics, "memory_total_bytes", "GPU-a") == 80 << 30
    assert value(metrics, "temperature_celsius", "GPU-b") == 61
    assert value(metrics, "power_watts", "GPU-b") == 312.5
    nvml.busy["GPU-b"] = 40
    assert value(metrics, "utilisation", "GPU-b") == 0.4


def test_what_a_gpu_does_not_tell_is_left_out(metrics: Metrics) -> None:
    assert watch_gpus(metrics, "texts", ["GPU-a"], Nvml("nvmlDeviceGetPowerUsage"))
    assert value(metrics, "power_watts", "GPU-a") is None
    assert value(metrics, "temperature_celsius", "GPU-a") == 61


@pytest.mark.parametrize(
    ("uuids", "broken"), [([], ()), (["GPU-a"], ("nvmlInit",)), (["GPU-a"], ("nvmlDeviceGetHandleByUUID",))]
)
def test_without_a_gpu_or_a_driver_nothing_is_exported(
    metrics: Metrics, uuids: list[str], broken: tuple[str, ...]
) -> None:
    assert not watch_gpus(metrics, "texts", uuids, Nvml(*broken))
    assert value(metrics, "utilisation", "GPU-a") is None


def test_the_failing_of_nvml_is_told_in_each_scrape_alone(metrics: Metrics) -> None:
    nvml = Nvml()
    assert watch_gpus(metrics, "texts", ["GPU-a"], nvml)
    nvml._broken = tuple(name for name in dir(Nvml) if name.startswith("nvmlDevice"))
    assert value(metrics, "utilisation", "GPU-a") is None
    nvml._broken = ()
    assert value(metrics, "utilisation", "GPU-a") == 0.8
