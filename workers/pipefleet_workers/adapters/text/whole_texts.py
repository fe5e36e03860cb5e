"""Bounds on the characters that a tokenizer takes at once. A tokenizer has no bound, and takes up to 600 bytes for a character.

Most long texts are cut or refused by their beginning (see `long_texts`). The remaining texts come here: texts that are read in
pieces, texts of few tokens for many characters, tables, pages of many words, labels. They are refused with ItemError (too_long),
since no cheaper check of them is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipefleet_workers.adapters.arguments import STAGE
from pipefleet_workers.items import ItemError

SETTING = "PIPEFLEET_WORKER_MAX_WHOLE_CHARACTERS"
MOST_LABELS = 100_000
"""Most labels of one input; the largest sets of classes have a fifth of this number."""
_EXPANDED = {"\ufdfa": 17, "\ufdfb": 7}
"""Signs that a normaliser (NFKC) expands, with the number of characters of each."""
MOST_EXPANDED = 1 + max(_EXPANDED.values())
"""Most characters that one character counts for."""
_LISTS = (list, tuple)


def characters(value: Any) -> int:
    """Characters of all texts in a tokenizer's argument, plus one for each text, since an empty text takes memory too."""
    if isinstance(value, str):
        return len(value) + 1 + (0 if value.isascii() else _further(value))
    if isinstance(value, _LISTS):
        return sum([characters(one) for one in value])
    if isinstance(value, Mapping):
        return sum([characters(one) for one in value.values()])
    if hasattr(value, "columns") and hasattr(value, "to_numpy"):  # a table of pandas
        return characters(list(value.columns)) + characters(value.to_numpy().tolist())
    return 0


def require_whole(size: int, most: int) -> None:
    """Raise ItemError (too_long) if `size` characters would be tokenised at once and this is above `most`."""
    if size > most:
        raise ItemError(
            "too_long",
            f"{size} characters would be tokenised at once, above {SETTING} ({most}); shorten the input",
            STAGE,
        )


def require_labels(labels: Sequence[str], most: int) -> None:
    """Raise ItemError (too_long) if an input has too many labels, or more characters of labels than are tokenised at once."""
    if len(labels) > MOST_LABELS:
        raise ItemError(
            "too_long", f"{len(labels)} labels are above {MOST_LABELS}; ask for them in several inputs", STAGE
        )
    require_whole(characters(labels), most)


def require_pieces(tokens: int, *, room: int, stride: int, longest: int, most: int) -> None:
    """Raise ItemError (too_long) if the overlapping pieces of a text of `tokens` tokens have more than `most` tokens together.

    A piece has room for `room` tokens of the text and shares `stride` tokens with the next piece. With its question it has
    `longest` tokens.
    """
    step = max(1, room - stride)
    pieces = 1 + (max(0, tokens - room) + step - 1) // step
    if pieces * longest > most:
        text = (
            f"the text would be read in {pieces} pieces of {longest} tokens, above {most} tokens ({SETTING}) together"
        )
        raise ItemError("too_long", f"{text}; let the pieces overlap less, or shorten the text", STAGE)


def require_few_pieces(
    tokenizer: Any, text: Any, *, room: int, stride: int, longest: int, most: int, **keywords: Any
) -> None:
    """`require_pieces` for a text, or its words. Tokens are counted only if the bytes of the text could make too many."""
    size = 4 * characters(text)
    if (size // max(1, room - stride) + 2) * longest > most:
        size = len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False, **keywords)["input_ids"])
        require_pieces(size, room=room, stride=stride, longest=longest, most=most)


def guard(tokenizer: Any, most: int) -> None:
    """Let a tokenizer refuse calls with more than `most` characters, with an ItemError (too_long)."""
    kind = type(tokenizer)

    class Guarded(kind):  # type: ignore[misc,valid-type]  # a class of the tokenizer's own
        def __call__(self, *positional: Any, **keywords: Any) -> Any:
            require_whole(_size(positional, keywords), most)
            return super().__call__(*positional, **keywords)

        def tokenize(self, text: Any, *positional: Any, **keywords: Any) -> Any:
            require_whole(characters(text), most)
            return super().tokenize(text, *positional, **keywords)

        def encode(self, *positional: Any, **keywords: Any) -> Any:
            require_whole(_size(positional, keywords), most)
            return super().encode(*positional, **keywords)

    Guarded.__name__, Guarded.__qualname__, Guarded.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    tokenizer.__class__ = Guarded


def _size(positional: Any, keywords: Mapping[str, Any]) -> int:
    """Characters of a call. The tokenizer repeats the whole table for each question about it."""
    size = characters(positional) + characters(keywords)
    table = keywords.get("table", positional[0] if positional else None)
    if hasattr(table, "columns"):
        queries = keywords.get("queries", keywords.get("query", positional[1] if len(positional) > 1 else None))
        size += characters(table) * (len(queries) - 1 if isinstance(queries, _LISTS) else 0)
    return size


def _further(text: str) -> int:
    return sum([text.count(sign) * more for sign, more in _EXPANDED.items()])
