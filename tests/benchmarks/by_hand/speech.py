"""Recordings by hand: Whisper's encoder in small batches, then one greedy loop over many rows that rows leave as they end.

generate() computes each row of a batch until the longest has ended. This loop is generate() for one window of 30 s and one beam:
the same prompt, the same suppressed tokens, the largest logit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tests.benchmarks.workloads import Workload, decode_item

RATE = 16_000
GPU_ENCODED, CPU_ENCODED = 32, 1
"""Recordings of one call of the encoder. On a CPU one alone is the fastest: its states stay in the cache."""
ROWS = 32
"""Recordings that are decoded together."""
MOST_ENDED = 0.25
"""The share of ended rows at which the others are copied together; at the end of the batch they are cut off for nothing."""


def transcribe(pipe: Any, workload: Workload, pieces: Iterable[list[str]]) -> dict[str, Any]:
    """The text of each recording."""
    outputs: dict[str, Any] = {}
    for names in _groups(pieces):
        names, states = _encoded(pipe, workload, names)
        rows = _Greedy(pipe, states).run()
        texts = pipe.tokenizer.batch_decode(rows, skip_special_tokens=True)
        outputs |= {name: {"text": text} for name, text in zip(names, texts, strict=True)}
    return outputs


def _groups(pieces: Iterable[list[str]]) -> Iterator[Iterator[str]]:
    """Names in groups of `ROWS`, drawn one by one, so that several processes encode the same number of recordings."""
    names = (name for piece in pieces for name in piece)
    for first in names:
        yield itertools.chain([first], itertools.islice(names, ROWS - 1))


def _encoded(pipe: Any, workload: Workload, names: Iterable[str]) -> tuple[list[str], Any]:
    """Names, longest recording first, and the encoder's states."""
    size = GPU_ENCODED if pipe.device.type == "cuda" else CPU_ENCODED
    found: list[tuple[int, str, Any]] = []
    batch: list[str] = []
    encoder = pipe.model.get_encoder()
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:

        def encode() -> None:
            sounds = list(threads.map(lambda name: decode_item(workload, name), batch))
            features = pipe.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt", device=str(pipe.device))
            states = encoder(features.input_features.to(pipe.device, pipe.model.dtype))[0]
            found.extend(zip(map(len, sounds), batch, states, strict=True))
            batch.clear()

        for name in names:
            batch.append(name)
            if len(batch) == size:
                encode()
        if batch:
            encode()
    found.sort(key=lambda one: -one[0])
    return [name for _, name, _ in found], torch.stack([states for _, _, states in found])


class _Greedy:
    """Greedy decoding of one batch. The longest recording is the first row, so most rows end at the tail."""

    def __init__(self, pipe: Any, states: Any) -> None:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        config = pipe.model.generation_config
        self._model, self._states = pipe.model, states
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self._end, self._most = config.eos_token_id, config.max_length
        self._suppressed = torch.tensor(config.suppress_tokens, device=states.device)
        self._suppressed_first = torch.tensor(config.begin_suppress_tokens, device=states.device)
        self._prompt = [config.decoder_start_token_id, config.no_timestamps_token_id]

    def run(self) -> list[list[int]]:
        """The tokens of each row, without prompt and end."""
        count = self._states.shape[0]
        written: list[list[int]] = [[] for _ in range(count)]
        ended = [False] * count
        rows, tokens = list(range(count)), torch.tensor([self._prompt] * count, device=self._states.device)
        for step in range(self._most - len(self._prompt)):
            chosen = self._step(tokens, first=step == 0)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                ended[row] = ended[row] or token == self._end
                if not ended[row]:
                    written[row].append(token)
            alive = [position for position, row in enumerate(rows) if not ended[row]]
            if not alive:
                break
            kept = self._keep(alive, len(rows))
            rows, tokens = [rows[position] for position in kept], chosen[kept][:, None]
        return written

    def _step(self, tokens: Any, *, first: bool) -> Any:
        """The next token of each row."""
        logits = self._model(
            decoder_input_ids=tokens, encoder_outputs=(self._states,), past_key_values=self._cache, use_cache=True
        ).logits[:, -1]
        logits[:, self._suppressed] = -torch.inf
        if first:
            logits[:, self._suppressed_first] = -torch.inf
        return logits.argmax(-1)

    def _keep(self, alive: list[int], count: int) -> list[int]:
        """Positions that go on: all up to the last that is alive (views of the cache), or only those alive (a copy)."""
        last = alive[-1] + 1
        if len(alive) < (1 - MOST_ENDED) * last:
            self._select(torch.tensor(alive, device=self._states.device))
            return alive
        if last < count:
            self._select(slice(0, last))
        return list(range(last))

    def _select(self, positions: Any) -> None:
        self._states = self._states[positions]
        for cache in (self._cache.self_attention_cache, self._cache.cross_attention_cache):
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[positions], layer.values[positions]
