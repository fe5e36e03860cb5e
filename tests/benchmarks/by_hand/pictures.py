"""Pictures by hand: decoded and resized by PIL in threads, normalised batch by batch, the next batch prepared meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.workloads import Workload, decode_item

GPU_PICTURES, CPU_PICTURES = 128, 8
AHEAD = 2
"""Batches that are prepared while one is in the model."""


def classify(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> dict[str, Any]:
    """The five best labels of each picture, as the pipeline gives them. The softmax is taken over all pictures at once."""
    batches = [(names, pipe.model(pixel_values=pixels).logits) for names, pixels in _prepared(pipe, workload, pieces)]
    labels = pipe.model.config.id2label
    probabilities = torch.cat([logits for _, logits in batches]).float().softmax(-1)
    best = probabilities.topk(min(5, len(labels)))
    names = [name for batch, _ in batches for name in batch]
    return {
        name: [{"label": labels[index], "score": score} for score, index in zip(scores, indices, strict=True)]
        for name, scores, indices in zip(names, best.values.tolist(), best.indices.tolist(), strict=True)
    }


def _prepared(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> Iterator[tuple[list[str], Any]]:
    """Names and pixels of each batch. A process with one torch thread needs no second thread: its core is never idle."""
    batches = _batches(pieces, GPU_PICTURES if pipe.device.type == "cuda" else CPU_PICTURES)
    if pipe.device.type == "cpu" and torch.get_num_threads() == 1:
        for names in batches:
            yield names, _pixels(pipe, [_small(pipe, workload, name) for name in names])
        return
    waiting: deque[tuple[list[str], list[Future[Any]]]] = deque()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for names in batches:
            waiting.append((names, [threads.submit(_small, pipe, workload, name) for name in names]))
            if len(waiting) > AHEAD:
                yield _taken(pipe, *waiting.popleft())
        while waiting:
            yield _taken(pipe, *waiting.popleft())


def _batches(pieces: Iterable[list[str]], size: int) -> Iterator[list[str]]:
    for piece in pieces:
        yield from (piece[start : start + size] for start in range(0, len(piece), size))


def _taken(pipe: Any, names: list[str], small: list[Future[Any]]) -> tuple[list[str], Any]:
    return names, _pixels(pipe, [one.result() for one in small])


def _small(pipe: Any, workload: Workload, name: str) -> Any:
    """The picture in the model's size, as bytes. PIL lets Python's lock go while it decodes and resizes."""
    processor = pipe.image_processor
    size = (processor.size["width"], processor.size["height"])
    return np.asarray(decode_item(workload, name).resize(size, Image.Resampling(processor.resample)))


def _pixels(pipe: Any, pictures: list[Any]) -> Any:
    """One copy to the device as bytes, scaled and normalised there."""
    processor = pipe.image_processor
    pixels = torch.from_numpy(np.stack(pictures)).to(pipe.device).permute(0, 3, 1, 2).float()
    mean, deviation = (
        torch.tensor(values, device=pipe.device).view(1, -1, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    return pixels.mul_(processor.rescale_factor).sub_(mean).div_(deviation).to(pipe.model.dtype).contiguous()
