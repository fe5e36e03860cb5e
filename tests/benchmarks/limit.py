"""The limit: a loop written by hand for one workload, everything in memory, nothing in between. No system can do much better."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests.benchmarks.workloads import Workload, decode_item

TOKENS = {"cpu": 2048, "cuda": 65_536}
PICTURES = {"cpu": 16, "cuda": 128}
RECORDINGS = {"cpu": 8, "cuda": 64}
"""Sizes of a batch by kind of device: padded tokens, pictures, recordings."""


def hand_written(pipe: Any, workload: Workload) -> list[Any]:
    """The outputs in the order of the items, sorted by length in between."""
    by_task = {
        "feature-extraction": _embed,
        "text-classification": _classify_texts,
        "automatic-speech-recognition": _transcribe,
        "image-classification": _classify_pictures,
    }
    with torch.inference_mode():
        return by_task[workload.task](pipe, workload)


def _embed(pipe: Any, workload: Workload) -> list[Any]:
    """Tokenise all at once, sort by length, cut by padded tokens, take the mean of each text's own tokens."""
    rows = [
        (batch, (hidden[0] * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))
        for batch, hidden, mask in _encoded(pipe, workload)
    ]
    return _in_order(rows)


def _classify_texts(pipe: Any, workload: Workload) -> list[Any]:
    rows = _in_order([(batch, outputs.logits) for batch, outputs, _ in _encoded(pipe, workload)])
    return [pipe.postprocess({"logits": torch.from_numpy(row[None])}, **workload.parameters) for row in rows]


def _encoded(pipe: Any, workload: Workload) -> Iterator[tuple[list[int], Any, Any]]:
    """Indices, model outputs and attention mask of each batch."""
    encoded = pipe.tokenizer(list(workload.items.values()), truncation=True)["input_ids"]
    budget = TOKENS[pipe.device.type]
    for batch in _cut(sorted(range(len(encoded)), key=lambda index: -len(encoded[index])), encoded, budget):
        inputs = pipe.tokenizer.pad({"input_ids": [encoded[index] for index in batch]}, return_tensors="pt")
        inputs = inputs.to(pipe.device)
        yield batch, pipe.model(**inputs), inputs["attention_mask"]


def _cut(order: list[int], encoded: list[list[int]], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for index in order:
        if batch and len(encoded[batch[0]]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _in_order(rows: list[tuple[list[int], Any]]) -> list[Any]:
    """The rows of all batches, copied from the device only now, so that no batch waits for the one before."""
    outputs: list[Any] = [None] * sum(len(batch) for batch, _ in rows)
    for batch, values in rows:
        for index, row in zip(batch, values.float().cpu().numpy(), strict=True):
            outputs[index] = row
    return outputs


def _transcribe(pipe: Any, workload: Workload) -> list[Any]:
    """Recordings of like length together, so that no row waits long for another's end."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        samples = list(threads.map(lambda name: decode_item(workload, name), workload.items))
    size = RECORDINGS[pipe.device.type]
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
    outputs: list[Any] = [None] * len(samples)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        found = pipe([samples[index] for index in batch], batch_size=len(batch), **workload.parameters)
        for index, output in zip(batch, found, strict=True):
            outputs[index] = output
    return outputs


def _classify_pictures(pipe: Any, workload: Workload) -> list[Any]:
    """Decode and preprocess in a thread for each core, stack, run."""
    names, size = list(workload.items), PICTURES[pipe.device.type]
    rows: list[tuple[list[int], Any]] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        prepared = threads.map(lambda name: pipe.preprocess(decode_item(workload, name))["pixel_values"], names)
        for start in range(0, len(names), size):
            batch = list(range(start, min(start + size, len(names))))
            pixels = torch.cat([next(prepared) for _ in batch]).to(pipe.device, pipe.model.dtype)
            rows.append((batch, pipe.model(pixel_values=pixels).logits))
    return [pipe.postprocess({"logits": torch.from_numpy(row[None])}, **workload.parameters) for row in _in_order(rows)]
