"""Texts by hand: all of a piece tokenised at once, sorted by length, cut by padded tokens, results taken from arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from tests.benchmarks.workloads import Workload

GPU_TOKENS = 65_536
CPU_TOKENS_PER_THREAD = 512
"""Padded tokens of a batch. Measured with MiniLM and one torch thread: 512 and 1,024 are equal, 2,048 takes 7 % longer."""
SMALL_MODEL, SMALL_MODEL_TOKENS = 1_000_000, 8192
"""Parameters below which a call costs more than its arithmetic, and a batch for such a model."""


def embed(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> dict[str, Any]:
    """The mean over each text's own tokens."""
    batches = []
    for names, outputs, mask in _forwarded(pipe, workload, pieces):
        weights = mask[:, :, None]
        batches.append((names, (outputs[0] * weights).sum(1) / weights.sum(1)))
    return {name: row for names, rows in batches for name, row in zip(names, _array(rows), strict=True)}


def classify(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> dict[str, Any]:
    """The best label of each text. The softmax is taken over all texts at once."""
    batches = [(names, outputs.logits) for names, outputs, _ in _forwarded(pipe, workload, pieces)]
    scores, indices = torch.cat([logits for _, logits in batches]).float().softmax(-1).max(-1)
    labels = pipe.model.config.id2label
    names = [name for batch, _ in batches for name in batch]
    found = zip(names, scores.tolist(), indices.tolist(), strict=True)
    return {name: [{"label": labels[index], "score": score}] for name, score, index in found}


def _forwarded(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> Iterator[tuple[list[str], Any, Any]]:
    """Names, model outputs and attention mask of each batch. On a GPU nothing waits for a batch here."""
    budget = _budget(pipe)
    tokenise = _tokeniser(pipe)
    for piece in pieces:
        rows = dict(zip(piece, tokenise([workload.items[name] for name in piece]), strict=True))
        for names in _cut(sorted(piece, key=lambda name: -len(rows[name])), rows, budget):
            ids, mask = _padded([rows[name] for name in names], pipe.tokenizer.pad_token_id)
            inputs = {"input_ids": ids.to(pipe.device), "attention_mask": mask.to(pipe.device)}
            yield names, pipe.model(**inputs), inputs["attention_mask"]


def _budget(pipe: Any) -> int:
    if pipe.device.type != "cpu":
        return GPU_TOKENS
    if pipe.model.num_parameters() < SMALL_MODEL:
        return SMALL_MODEL_TOKENS
    return CPU_TOKENS_PER_THREAD * torch.get_num_threads()


def _tokeniser(pipe: Any) -> Any:
    """Texts to lists of ids, by the Rust tokenizer itself, which takes a third of the time that the call around it takes."""
    pipe.tokenizer("", truncation=True)  # the call leaves its settings in the Rust tokenizer
    backend, threads = pipe.tokenizer.backend_tokenizer, torch.get_num_threads()
    encode = getattr(backend, "encode_batch_fast", backend.encode_batch)

    def tokenise(texts: Sequence[str]) -> list[list[int]]:
        share = -(-len(texts) // threads)
        parts = [texts[start : start + share] for start in range(0, len(texts), share)]
        with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
            return [row.ids for part in pool.map(encode, parts) for row in part]

    return tokenise


def _cut(names: list[str], rows: dict[str, list[int]], budget: int) -> Iterator[list[str]]:
    """Batches of names, longest first, none with more padded tokens than `budget` unless one text alone has more."""
    start = 0
    while start < len(names):
        size = max(1, budget // len(rows[names[start]]))
        yield names[start : start + size]
        start += size


def _padded(rows: Sequence[list[int]], pad: int) -> tuple[Any, Any]:
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def _array(rows: Any) -> Any:
    return rows.float().cpu().numpy()
