"""Gauges of the worker's GPUs, read from NVML at each scrape.

`build` passes the names from `visible_gpus` to `watch_gpus`, which adds the gauges to the worker's metrics. Nothing is raised:
there are no gauges without a GPU, without nvidia-ml-py or without an answer of the driver.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipefleet_workers.observe.metrics import Metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One gauge: its description, and how to read it from NVML."""

    text: str
    read: Callable[[Any, Any], float]


_GAUGES = {
    "utilisation": _Reading(
        "share of the last moment in which a kernel ran",
        lambda nvml, one: nvml.nvmlDeviceGetUtilizationRates(one).gpu / 100,
    ),
    "memory_used_bytes": _Reading("memory in use", lambda nvml, one: nvml.nvmlDeviceGetMemoryInfo(one).used),
    "memory_total_bytes": _Reading("memory", lambda nvml, one: nvml.nvmlDeviceGetMemoryInfo(one).total),
    "temperature_celsius": _Reading(
        "temperature", lambda nvml, one: nvml.nvmlDeviceGetTemperature(one, nvml.NVML_TEMPERATURE_GPU)
    ),
    "power_watts": _Reading("power", lambda nvml, one: nvml.nvmlDeviceGetPowerUsage(one) / 1000),
}


class GpuCollector(Collector):
    """`pipefleet_gpu_…{pool,gpu}` of some GPUs, given as NVML handles by uuid. `nvml` is the module `pynvml`."""

    def __init__(self, nvml: Any, handles: Mapping[str, Any], pool: str) -> None:
        self._nvml = nvml
        self._handles = handles
        self._pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Every gauge that the GPUs can report. Missing values are left out, so no scrape fails because of them."""
        for name, gauge in _GAUGES.items():
            family = GaugeMetricFamily(f"pipefleet_gpu_{name}", f"of the GPU: {gauge.text}", labels=["pool", "gpu"])
            for uuid, handle in self._handles.items():
                try:
                    family.add_metric([self._pool, uuid], float(gauge.read(self._nvml, handle)))
                except self._nvml.NVMLError as error:
                    log.debug("GPU %s does not tell its %s: %s", uuid, name, error)
            if family.samples:
                yield family

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Yield nothing, so that registering does not ask the driver."""
        return iter(())


def watch_gpus(metrics: Metrics, pool: str, uuids: list[str], nvml: Any = None) -> bool:
    """Add the gauges of these GPUs to the worker's metrics. False, with nothing added, if this is not possible.

    `nvml` is `pynvml`, unless a test passes another module.
    """
    if not uuids:
        return False
    try:
        nvml = nvml or importlib.import_module("pynvml")
    except ImportError:
        log.info("no GPU metrics: pip install 'pipefleet[gpu]' brings nvidia-ml-py")
        return False
    try:
        nvml.nvmlInit()
        handles = {uuid: nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
    except nvml.NVMLError as error:
        log.warning("no GPU metrics: the driver says %s", error)
        return False
    metrics.add(GpuCollector(nvml, handles, pool))
    return True


def visible_gpus(*, every: bool, index: int | None) -> list[str]:
    """NVML's names of the GPUs that torch uses: with `every` all visible GPUs, else `cuda:index`; none without a GPU.

    Names are uuids, since the driver numbers GPUs without regard to CUDA_VISIBLE_DEVICES. Imports torch.
    """
    import torch

    if not torch.cuda.is_available():
        return []
    numbers = range(torch.cuda.device_count()) if every else [index or 0]
    return [f"GPU-{torch.cuda.get_device_properties(number).uuid}" for number in numbers]
