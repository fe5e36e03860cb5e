"""A decoder with a paged cache, one step at a time: transformers' continuous batching, driven from the caller's thread.

Sequences of tokens go in with `join`; each `step` gives one token for every sequence that has read its prompt. transformers' own
manager runs a thread; here only its batch processor is used, so that the device keeps one owner. Its parts are not public: a
version without them, and a model that it cannot serve, raise UnsuitedError. Then the worker goes on with ordinary
batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from pipefleet_workers.adapters.base import brief
from pipefleet_workers.adapters.writing.row_attention import NAME, Layout, attend

Choose = Callable[[Sequence[str], torch.Tensor], torch.Tensor]
"""Gets the names of sequences and the scores of their next tokens `[sequences, vocabulary]`; the largest returned score wins."""


_DYNAMIC = frozenset({"dynamic", "longrope"})
"""Kinds of rotary positions that change for all rows when one row grows long; short examples do not show it."""


class UnsuitedError(Exception):
    """The model, or this version of transformers, has no paged cache that this module can drive."""


@dataclass(frozen=True, slots=True)
class Pages:
    """A paged cache of `count` pages of `size` tokens each. A step reads at most `chunk` tokens, of at most `rows` sequences."""

    count: int
    size: int
    chunk: int
    rows: int


class PagedDecoder:
    """For one thread. After a step that raises, `clear` must be called."""

    def __init__(self, model: Any, pages: Pages, choose: Choose) -> None:
        """Raises UnsuitedError."""
        self._model = model
        self._own = model.config._attn_implementation
        if self._own != "sdpa":
            raise UnsuitedError(f"the attention {self._own} cannot read pages here")
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.WARNING)  # it has a handler of its own
        with self._foreign():
            from transformers import AttentionInterface

            AttentionInterface.register(NAME, attend)
            devices = [model.device] if model.device.type == "cuda" else []
            with self._turn(), torch.random.fork_rng(devices=devices):  # making a processor seeds torch
                self._processor, self._scores = _processor(model, pages, choose)
        if _DYNAMIC & set(_rope_types(model.config.get_text_config())):
            raise UnsuitedError("its rotary positions depend on the longest row of a step")
        if not _is_full(self._processor.cache):
            raise UnsuitedError("the model has attention other than full attention")

    @property
    def bytes(self) -> int:
        """Bytes of the cache."""
        cache = self._processor.cache
        whole = getattr(cache, "cache_tensor", None)
        return int(
            whole.nbytes if whole is not None else sum(one.nbytes for one in cache.key_cache + cache.value_cache)
        )

    def unread(self, *, without: Collection[str] = ()) -> int:
        """Tokens of prompts that are still to be read, but for the sequences in `without`."""
        scheduler = self._processor.scheduler
        states = (*scheduler.waiting_requests.values(), *scheduler.active_requests.values())
        return sum(len(one.remaining_prefill_tokens) for one in states if one.request_id not in without)

    def join(self, name: str, tokens: list[int], most: int, ends: Collection[int]) -> None:
        """Take in a sequence. It ends by itself after `most` new tokens, or behind one of the tokens `ends`."""
        from transformers.generation.continuous_batching.requests import RequestState

        state = RequestState(name, tokens, max_new_tokens=most, eos_token_id=sorted(ends))
        self._processor.scheduler.add_waiting_request(state)

    def leave(self, name: str) -> None:
        """Drop a sequence, and free its pages at once."""
        self._processor.scheduler.set_request_cancellation(name)
        self._processor.scheduler.clear_cancelled_requests()

    def step(self) -> list[tuple[str, int]]:
        """The next token of each sequence that has read its prompt."""
        processor = self._processor
        with torch.inference_mode(), self._turn():
            if not processor.prepare_next_batch():
                return []
            inputs = processor.inputs_and_outputs
            parts = [(one.query_length, one.state.position_offset) for one in inputs.requests_in_batch]
            processor.cache.layout = Layout(parts, inputs.read_index_storage[0] if inputs.max_kv_read else None)
            processor._generation_step(self._model)
            processor.update_batch()
        return [(one.state.request_id, one.state.generated_tokens[-1]) for one in self._scores.turn]

    def clear(self) -> None:
        """Drop all sequences."""
        with torch.inference_mode():
            self._processor.reset()

    @contextlib.contextmanager
    def pieces_of(self, tokens: int) -> Iterator[None]:
        """A context in which a step reads at most so many tokens."""
        before, self._processor.max_batch_tokens = self._processor.max_batch_tokens, tokens
        try:
            yield
        finally:
            self._processor.max_batch_tokens = before

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """A context in which the model's attention reads the pages. Outside of it generate() works as ever."""
        self._model.config._attn_implementation = NAME
        try:
            yield
        finally:
            self._model.config._attn_implementation = self._own

    @contextlib.contextmanager
    def _foreign(self) -> Iterator[None]:
        """A context whose errors mean that there is no paged cache: whatever a version lacks, or refuses."""
        try:
            yield
        except Exception as error:
            raise UnsuitedError(brief(error)) from error


def _is_full(cache: Any) -> bool:
    """Whether all layers have full attention and one set of pages, as each version of the cache says it."""
    allocators = getattr(cache, "cache_allocators", None)
    if allocators is not None:
        return list(allocators) == ["full_attention"]
    return set(cache.sliding_windows.values()) == {1} and len(cache.group_cache_managers) == 1


def _rope_types(config: Any) -> Iterator[str]:
    """The kinds of rotary positions that a config names, for all layers or for each kind of layer."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    while found:
        one = found.pop()
        if isinstance(one, Mapping):
            found += one.values()
            yield str(one.get("rope_type", one.get("type", "")))


def _processor(model: Any, pages: Pages, choose: Choose) -> tuple[Any, Any]:
    """The batch processor of a manager that is never started, and the processor of its scores."""
    own = model.config._attn_implementation
    model.config._attn_implementation = "sdpa"  # the manager knows no other name
    try:
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = model.init_continuous_batching(settings, continuous_batching_config=_config(pages))
    finally:
        model.config._attn_implementation = own
    scores = manager.logit_processor = _scores(choose)
    with torch.inference_mode():
        processor = manager._create_batch_processor()
    processor.output_router = _Unheard()
    return processor, scores


def _scores(choose: Choose) -> Any:
    """A processor that notes the sequences of a step before the model runs, and lets `choose` change their scores."""
    from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

    class Scores(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
        turn: Sequence[Any] = ()

        def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: torch.Tensor) -> torch.Tensor:
            self.turn = [one for one in requests_in_batch if one.has_new_token]
            return arg_storage

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: Any) -> torch.Tensor:
            # Behind these rows come as many more as there are prompts that are not read to their end.
            count = len(self.turn)
            chosen = choose([one.state.request_id for one in self.turn], scores[:count])
            return chosen if count == len(scores) else torch.cat([chosen, scores[count:]])

    found = Scores(LogitsProcessorList())
    found.do_processing = True
    return found


def _config(pages: Pages) -> Any:
    """The settings of the manager, under the names of this version of transformers."""
    from transformers import ContinuousBatchingConfig

    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    version: dict[str, Any] = {"page_size" if "page_size" in known else "block_size": pages.size}
    if "auto_switch_to_flash" in known:
        version["auto_switch_to_flash"] = False
    return ContinuousBatchingConfig(
        **version,
        num_blocks=pages.count,
        max_batch_tokens=pages.chunk,
        max_requests_per_batch=pages.rows,
        max_memory_percent=1.0,
        max_blocks_per_request=0,
        safety_margin=0.0,  # the writer admits only sequences that fit until their ends
        seed=0,
        use_async_batching=False,
        use_cuda_graph=False,
    )


class _Unheard:
    """Drops the results that transformers collects; `step` returns the tokens."""

    def deliver(self, output: Any) -> None:
        """Drop a result."""

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        """Drop results."""

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Drop a failure: the step raises as well."""
