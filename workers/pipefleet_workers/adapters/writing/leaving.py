"""Rows that have ended leave the batch: on a CPU, an encoder-decoder writes only for the rows that go on.

generate() keeps the rows of a batch together until the longest answer ends, and each row takes time at each step. `LeavingRows`
stands around the model's forward: it takes ended rows out of the inputs and the cache, and gives generate() zeros as their scores.
generate() ignores these. A GPU runs all rows at once, so nothing would be gained there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, StoppingCriteria
from transformers.modeling_outputs import BaseModelOutput

SHARE = 0.75
"""Rows leave when at most this share of the rows goes on: taking them out copies the cache of all others."""
_BY_ROW = ("decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "attention_mask")


class LeavingRows(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Ends no row itself, but sees which rows have ended. For one call of generate(), on one thread, as a context around it."""

    def __init__(self, model: Any, ends: Sequence[int], others: Sequence[Any] = ()) -> None:
        """Rows end at a token of `ends`, or where one of the criteria `others` ends them; these are not passed to generate()."""
        self._model = model
        self._ends = torch.tensor(list(ends), dtype=torch.long)
        self._others = others
        self._ended = torch.zeros(0, dtype=torch.bool)
        self._left = torch.zeros(0, dtype=torch.long)
        """The rows whose cache is still there."""
        self._states: Any = None

    @staticmethod
    def possible(model: Any, rows: int, asked: Callable[[str], Any]) -> bool:
        """Whether rows may leave a call with the arguments that `asked` tells by name.

        Beams change their rows at every step; outputs beside the tokens want every row.
        """
        plain = (asked("num_beams") or 1) == 1 and not asked("return_dict_in_generate")
        return model.device.type == "cpu" and rows > 1 and plain

    def __enter__(self) -> LeavingRows:
        self._thread = threading.get_ident()  # other threads may run batches through the same model
        self._hooks = (
            self._model.register_forward_pre_hook(self._take_out, with_kwargs=True),
            self._model.register_forward_hook(self._fill_up),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        """For each row whether one of the other criteria ends it."""
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for one in self._others:
            done |= one(input_ids, scores, **more)
        if len(self._ended) != len(done):
            self._ended, self._left = torch.zeros_like(done), torch.arange(len(done))
        self._ended |= done | torch.isin(input_ids[:, -1], self._ends)
        return done

    def _take_out(
        self, model: Any, arguments: Any, named: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """`named` is missing where another thread's forward meets this hook while it is removed."""
        rows = len(self._ended)
        if named is None or not rows or threading.get_ident() != self._thread or not _has_rows(named, rows):
            return None
        live = ~self._ended[self._left]
        if 0 < int(live.sum()) <= SHARE * len(live):
            named["past_key_values"].batch_select_indices(live.nonzero().flatten())
            self._left = self._left[live]
            self._states = BaseModelOutput(last_hidden_state=named["encoder_outputs"][0][self._left])
        if len(self._left) == rows:
            return None
        mine = {name: named[name][self._left] for name in _BY_ROW if isinstance(named.get(name), torch.Tensor)}
        return arguments, {**named, **mine, "encoder_outputs": self._states}

    def _fill_up(self, model: Any, arguments: Any, output: Any) -> None:
        logits, rows = output.logits, len(self._ended)
        if threading.get_ident() != self._thread:
            return
        if len(self._left) < rows and len(logits) == len(self._left):
            output.logits = logits.new_zeros(rows, *logits.shape[1:]).index_copy(0, self._left, logits)


def _has_rows(named: dict[str, Any], rows: int) -> bool:
    """Whether these are the inputs of a step with a cache that rows can be taken from."""
    cache, tokens = named.get("past_key_values"), named.get("decoder_input_ids")
    if tokens is None or len(tokens) != rows or not isinstance(cache, EncoderDecoderCache):
        return False
    return all(isinstance(one, DynamicCache) for one in (cache.self_attention_cache, cache.cross_attention_cache))
