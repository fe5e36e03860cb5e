"""The share of time in which a device computes, from its first kernel to its last; on a CPU, in which the model's forward runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType

_COPIES = ("Memcpy", "Memset")


def busy_share(model: torch.nn.Module, device: str, run: Callable[[], Any]) -> float:
    """Call `run` once more and look. Slower than an ordinary run, so its time does not count."""
    spans = _kernels(run) if device != "cpu" else _forwards(model, run)
    return share(spans)


def share(spans: Iterable[tuple[float, float]]) -> float:
    """The covered share of the time from the first start to the last end; spans that overlap count once."""
    ordered = sorted(spans)
    if not ordered:
        return 0.0
    covered, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / max(1e-9, end - ordered[0][0])


def _kernels(run: Callable[[], Any]) -> list[tuple[float, float]]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == DeviceType.CUDA and not event.name().startswith(_COPIES)
    ]


def _forwards(model: torch.nn.Module, run: Callable[[], Any]) -> list[tuple[float, float]]:
    spans: list[tuple[float, float]] = []
    here = threading.local()

    def begin(*_: Any) -> None:
        here.begin = time.perf_counter()

    def end(*_: Any) -> None:
        spans.append((here.begin, time.perf_counter()))

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return spans
