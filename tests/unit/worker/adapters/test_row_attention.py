"""Attention by rows: for any mix of rows, each gives what attention over its own keys alone gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from pipefleet_workers.adapters.writing.row_attention import Layout, attend

HEADS, KEY_HEADS, SIZE, PLACES = 4, 2, 8, 4096


class Cache:
    """A cache whose keys lie at any places, as pages do."""

    cache_allocators: tuple[str, ...] = ()

    def __init__(self, layout: Layout, write: torch.Tensor) -> None:
        self.layout = layout
        self.keys, self.values = torch.randn(PLACES, KEY_HEADS, SIZE), torch.randn(PLACES, KEY_HEADS, SIZE)
        self._write = write

    def update(self, key_states: Any, value_states: Any, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        (read,) = kwargs["read_index"]
        self.keys[self._write], self.values[self._write] = (
            key_states[0].transpose(0, 1),
            value_states[0].transpose(0, 1),
        )
        if not len(read):
            return key_states, value_states
        return tuple(one[read].transpose(0, 1)[None] for one in (self.keys, self.values))


# Rows of a step: new tokens, and tokens before them.
_ROWS = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 40)), st.integers(0, 150)), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(_ROWS, st.integers(0, 1 << 30))
def test_each_row_hears_its_own_keys_and_no_later_ones(rows: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    lengths = [(new, new + before) for new, before in rows]
    places = torch.randperm(PLACES)[: sum(keys for _, keys in lengths)]
    own = places.split([keys for _, keys in lengths])
    write = torch.cat([one[len(one) - new :] for one, (new, _) in zip(own, lengths, strict=True)])
    fresh = all(new == keys for new, keys in lengths)
    cache = Cache(Layout(lengths, None if fresh else places), write)
    tokens = len(write)
    query, key, value = (torch.randn(1, heads, tokens, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    module = SimpleNamespace(layer_idx=0)
    found, _ = attend(module, query, key, value, None, scaling=0.3, cache=cache, read_index=[None])
    begin = 0
    for (new, keys), at in zip(lengths, own, strict=True):
        heard = [one[at].transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, 0) for one in (cache.keys, cache.values)]
        mask = torch.ones(new, keys, dtype=torch.bool).tril(keys - new)
        wanted = scaled_dot_product_attention(query[0, :, begin : begin + new], *heard, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(found[0, begin : begin + new], wanted.transpose(0, 1), atol=1e-5, rtol=1e-4)
        begin += new


def test_an_argument_that_changes_the_scores_is_refused() -> None:
    query = torch.randn(1, HEADS, 1, SIZE)
    with pytest.raises(TypeError, match="softcap"):
        attend(SimpleNamespace(layer_idx=0), query, query, query, None, cache=object(), softcap=30.0)
