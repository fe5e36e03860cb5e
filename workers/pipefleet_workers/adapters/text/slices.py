"""Slices of texts on their way through a tokenizer: `SliceTokenizer` gives the numbers that the tokenizer's own call gives, faster.

`TextEncoder.encode` calls it with the texts of many items. transformers makes several objects for each text and asks its Rust
tokenizer for the offsets of every token, which no encoder reads. The first call with given arguments takes both ways and compares
them; arguments or tokenizers for which they differ keep the call of transformers. The errors are the tokenizer's own. A number
that all tokens of a text have stands for the list of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipefleet_workers.adapters.arguments import REMEMBERED
from pipefleet_workers.adapters.text.whole_texts import MOST_EXPANDED, characters, require_whole

_PARTS = {
    "input_ids": "ids",
    "token_type_ids": "type_ids",
    "attention_mask": "attention_mask",
    "special_tokens_mask": "special_tokens_mask",
}
"""The model's inputs, and the names of the Rust tokenizer for them."""
_ALIKE = ("token_type_ids", "attention_mask")
_ARGUMENTS = {"truncation", "max_length", "padding", "add_special_tokens"}


class SliceTokenizer:
    """Tokenises slices of texts with one tokenizer; like it, for one thread at a time. A call takes at most `most` characters."""

    def __init__(self, tokenizer: Any, most: int) -> None:
        self._tokenizer = tokenizer
        self._most = most
        self._quick = _is_plain(tokenizer)
        self._proved: dict[str, tuple[Any, dict[str, int | None]]] = {}
        """By arguments: the state of the Rust tokenizer that belongs to them, and the names of the model's inputs, each with the
        number that all tokens have."""

    def encode(self, texts: Sequence[str], keywords: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The model's inputs of each text, as `tokenizer(texts, **keywords)` gives them. Raises the tokenizer's errors."""
        called = repr(sorted(keywords.items()))
        proved = self._proved.get(called)
        if proved is not None and proved[0] == self._state():
            if MOST_EXPANDED * sum(map(len, texts)) + len(texts) > self._most:
                require_whole(characters(texts), self._most)
            return self._rows(texts, proved[1], keywords)
        encoded = self._tokenizer(list(texts), **keywords)
        names = list(encoded)
        rows = [dict(zip(names, row, strict=True)) for row in zip(*[encoded[name] for name in names], strict=True)]
        if self._quick and proved is None and keywords.keys() <= _ARGUMENTS and set(names) <= _PARTS.keys():
            self._quick = self._rows(texts, dict.fromkeys(names), keywords) == rows
            if len(self._proved) >= REMEMBERED:
                self._proved.clear()
            if self._quick:
                self._proved[called] = self._state(), {name: self._alike(name, rows) for name in names}
        return rows

    def _alike(self, name: str, rows: Sequence[Mapping[str, list[int]]]) -> int | None:
        """The number that an input has for all tokens of any text; None where it depends on the token.

        A tokenizer gives one type to all tokens of a text, and one to each token that it adds; so a text that has both tells all.
        """
        numbers = {number for row in rows for number in row[name]}
        longest = max((len(row[name]) for row in rows), default=0)
        known = len(numbers) == 1 and longest > self._tokenizer.num_special_tokens_to_add()
        unpadded = self._tokenizer.backend_tokenizer.padding is None
        return numbers.pop() if known and unpadded and name in _ALIKE else None

    def _rows(
        self, texts: Sequence[str], names: Mapping[str, int | None], keywords: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        special = keywords.get("add_special_tokens", True)
        encoded = self._tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        columns = [
            [getattr(one, _PARTS[name]) for one in encoded] if alike is None else [alike] * len(encoded)
            for name, alike in names.items()
        ]
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def _state(self) -> Any:
        """How the Rust tokenizer cuts and pads; each call of transformers may change it."""
        backend = self._tokenizer.backend_tokenizer
        return backend.truncation, backend.padding, backend.encode_special_tokens


def _is_plain(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer goes straight to a Rust tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or not hasattr(
        tokenizer.backend_tokenizer, "encode_batch_fast"
    ):
        return False
    calls = [vars(one)["__call__"] for one in type(tokenizer).__mro__ if "__call__" in vars(one)]
    encodes = [name for name in ("_encode_plus", "_batch_encode_plus") if hasattr(PreTrainedTokenizerFast, name)]
    own = [name for name in encodes if getattr(type(tokenizer), name) is not getattr(PreTrainedTokenizerFast, name)]
    guarded = getattr(calls[0], "__module__", "") == require_whole.__module__  # its bound is kept here as well
    return calls[guarded] is PreTrainedTokenizerBase.__call__ and not own
