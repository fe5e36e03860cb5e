"""The limit: a loop written by hand for one workload, everything in memory, nothing in between. No system can do much better."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests.benchmarks.workloads import Workload, decode_item

TOKENS = 2048
RECORDINGS = 8
PICTURES = 16


def hand_written(pipe: Any, workload: Workload) -> list[Any]:
    """The outputs in the order of the items, sorted by length in between."""
    by_task = {
        "feature-extraction": _embed,
        "automatic-speech-recognition": _transcribe,
        "image-classification": _classify,
    }
    with torch.inference_mode():
        return by_task[workload.task](pipe, workload)


def _embed(pipe: Any, workload: Workload) -> list[Any]:
    """Tokenise all at once, sort by length, cut by padded tokens, take the mean of each text's own tokens."""
    encoded = pipe.tokenizer(list(workload.items.values()), truncation=True)["input_ids"]
    outputs: list[Any] = [None] * len(encoded)
    for batch in _cut(sorted(range(len(encoded)), key=lambda index: -len(encoded[index])), encoded):
        inputs = pipe.tokenizer.pad({"input_ids": [encoded[index] for index in batch]}, return_tensors="pt")
        hidden = pipe.model(**inputs)[0]
        mask = inputs["attention_mask"][:, :, None]
        for index, row in zip(batch, ((hidden * mask).sum(1) / mask.sum(1)).numpy(), strict=True):
            outputs[index] = row
    return outputs


def _cut(order: list[int], encoded: list[list[int]]) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and len(encoded[batch[0]]) * (len(batch) + 1) > TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _decoded(workload: Workload) -> list[Any]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda name: decode_item(workload, name), workload.items))


def _transcribe(pipe: Any, workload: Workload) -> list[Any]:
    """Recordings of like length together, so that no row waits long for another's end."""
    samples = _decoded(workload)
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
    outputs: list[Any] = [None] * len(samples)
    for start in range(0, len(order), RECORDINGS):
        batch = order[start : start + RECORDINGS]
        found = pipe([samples[index] for index in batch], batch_size=len(batch), **workload.parameters)
        for index, output in zip(batch, found, strict=True):
            outputs[index] = output
    return outputs


def _classify(pipe: Any, workload: Workload) -> list[Any]:
    """Decode and preprocess in two threads, stack, run."""
    names = list(workload.items)
    outputs: list[Any] = []
    with ThreadPoolExecutor(2) as threads:
        prepared = threads.map(lambda name: pipe.preprocess(decode_item(workload, name))["pixel_values"], names)
        batch: list[Any] = []
        for index, pixels in enumerate(prepared):
            batch.append(pixels)
            if len(batch) == PICTURES or index == len(names) - 1:
                logits = pipe.model(pixel_values=torch.cat(batch)).logits
                outputs += [pipe.postprocess({"logits": row[None]}, **workload.parameters) for row in logits]
                batch = []
    return outputs
