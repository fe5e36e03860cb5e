"""Attention over a paged cache, each row with its own keys alone.

transformers' `sdpa` multiplies the queries of all rows with the keys of all rows, and hides the foreign ones behind a mask: the
price grows with the square of the rows. Here rows of like length share a padded call, and each piece of a prompt has its own.
`Layout` is made once for each step; `attend` runs in every layer. Arguments that it does not know raise TypeError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "pipefleet_rows"
_LIKE = 2
"""Rows share a call if the longest has at most so many times the keys of the shortest."""
_SHORT = 64
"""Rows with fewer keys count as rows of this length: for them one call is cheaper than two."""
_KNOWN = frozenset({
    "read_index", "write_index", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k",
    "block_table",
    "logits_indices", "logits_processor_args", "position_ids", "use_cache", "is_causal", "output_attentions",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that read one query each: their places among the queries, the padded number of keys, and the mask of the padding."""

    places: torch.Tensor
    width: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of one prompt: its queries, the number of its keys, and the causal mask where keys come before the piece."""

    begin: int
    end: int
    width: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Part:
    """The part of one row in a step, before it is put into a call."""

    keys: int
    query: int
    key: int


class Layout:
    """The calls of one step. `index` names the places in the cache to read, in the order in which `attend` uses them."""

    def __init__(self, lengths: Sequence[tuple[int, int]], read: torch.Tensor | None) -> None:
        """`lengths` has for each row its queries and its keys. `read` names the places of all keys; None if all are new."""
        self.rows: list[_Rows] = []
        self.pieces: list[_Piece] = []
        device = torch.device("cpu") if read is None else read.device
        single: list[_Part] = []
        indices: list[torch.Tensor] = []
        tail: list[torch.Tensor] = []
        query = key = 0
        for queries, keys in lengths:
            if queries == 1 and read is not None:
                single.append(_Part(keys, query, key))
            else:
                self.pieces.append(_Piece(query, query + queries, keys, _causal(queries, keys, device)))
                if read is not None:
                    tail.append(read[key : key + keys])
            query += queries
            key += keys
        for group in _groups(single):
            assert read is not None
            indices.append(self._add(group, read))
        self.index = torch.cat([*indices, *tail]) if read is not None else torch.empty(0, dtype=torch.long)

    def _add(self, group: Sequence[_Part], read: torch.Tensor) -> torch.Tensor:
        """Add a call for rows of like length; the places of their keys, padded with the last one."""
        width, device = group[-1].keys, read.device
        keys = torch.tensor([one.keys for one in group], device=device)[:, None]
        first = torch.tensor([one.key for one in group], device=device)[:, None]
        steps = torch.arange(width, device=device)
        mask = None if group[0].keys == width else (steps < keys)[:, None, None]
        self.rows.append(_Rows(torch.tensor([one.query for one in group], device=device), width, mask))
        return read[first + torch.minimum(steps, keys - 1)].flatten()


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    group: list[_Part] = []
    for part in sorted(parts, key=lambda one: one.keys):
        if group and part.keys > _LIKE * max(_SHORT, group[0].keys):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
    """The mask of a piece whose first keys come before it; None where torch's own causal mask fits."""
    if queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _read(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the new keys and values of a layer, and read the places of the layout: `[1, heads, places, size]` each."""
    if hasattr(cache, "cache_allocators"):  # older versions of the cache have none, and take the two indices alone
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
        return key, value
    found = cache.update(key, value, layer, kwargs["read_index"], kwargs["write_index"])
    key, value = (one.transpose(0, 1)[None] for one in found)
    return key, value


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, for a step with a `Layout` as `cache.layout`. `[1, heads, tokens, size]` go in."""
    unknown = [name for name, given in kwargs.items() if name not in _KNOWN and given is not None]
    if unknown or attention_mask is not None or cache is None:
        raise TypeError(f"attention over pages does not know {unknown or 'a mask'}")
    layout: Layout = cache.layout
    kwargs["read_index"] = [layout.index for _ in kwargs["read_index"]]
    key, value = _read(cache, key, value, module.layer_idx, kwargs)
    found = query.new_empty(*query.shape[:-1], value.shape[-1])
    at = 0
    for one in layout.rows:
        span = slice(at, at + len(one.places) * one.width)
        _attend_rows(one, query, key[:, :, span], value[:, :, span], scaling, found)
        at = span.stop
    for piece in layout.pieces:
        span = slice(at, at + piece.width)
        _attend_piece(piece, query, key[:, :, span], value[:, :, span], scaling, found)
        at = span.stop
    return found.transpose(1, 2).contiguous(), None


def _attend_rows(
    rows: _Rows, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, found: torch.Tensor
) -> None:
    """Write the results of rows that share a call into `found`. `key` and `value` are theirs alone."""
    count, heads = len(rows.places), key.shape[1]
    shape = (heads, count, rows.width, -1)
    keys, values = (each[0].reshape(shape).transpose(0, 1) for each in (key, value))
    # Query heads that share a head of keys stand as further queries of this head, so no keys are repeated.
    asked = query[0, :, rows.places].transpose(0, 1).reshape(count, heads, query.shape[1] // heads, -1)
    heard = scaled_dot_product_attention(asked, keys, values, attn_mask=rows.mask, scale=scaling)
    found[0, :, rows.places] = heard.reshape(count, query.shape[1], -1).transpose(0, 1)


def _attend_piece(
    piece: _Piece,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    found: torch.Tensor,
) -> None:
    """The same for a piece of a prompt."""
    share = query.shape[1] // key.shape[1]
    if share > 1:
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    own = slice(piece.begin, piece.end)
    causal = piece.mask is None and piece.end - piece.begin > 1
    found[:, :, own] = scaled_dot_product_attention(
        query[:, :, own], key, value, attn_mask=piece.mask, is_causal=causal, scale=scaling
    )
