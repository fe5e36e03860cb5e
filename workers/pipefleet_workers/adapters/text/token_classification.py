"""The adapter of token-classification: a text, or a list of its words, goes in; its entities come out.

A text is one unit; with `stride` a long text becomes several units that overlap and together cover it. The pipeline's own
postprocess joins the units' logits. Raises ItemError: bad_input for words instead of a text or the reverse, bad_parameter for a
stride that leaves no room, too_long for a text of too many pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.pipelines.token_classification import AggregationStrategy

from pipefleet_workers.adapters.arguments import STAGE, Arguments
from pipefleet_workers.adapters.text.encoder import TextEncoder
from pipefleet_workers.adapters.text.whole_texts import require_few_pieces
from pipefleet_workers.items import Assembly, Decoded, ItemError, Unit

_Array = np.ndarray[Any, Any]
_OF_A_CHUNK = ("special_tokens_mask", "offset_mapping")


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of a text: model inputs, which tokens are special, and for each token its place in the text and its word."""

    features: dict[str, _Array]
    special: _Array
    offsets: _Array | None
    words: _Array | None
    """-1 for tokens without a word."""

    @property
    def nbytes(self) -> int:
        """Bytes in addition to the model's inputs."""
        return sum([0 if one is None else one.nbytes for one in (self.special, self.offsets, self.words)])


@dataclass(frozen=True, slots=True)
class Sentence:
    """One text with its chunks; `spans` are the characters of its words if it came as a list of words."""

    text: str
    chunks: list[Chunk]
    spans: list[tuple[int, int]] | None


@dataclass(frozen=True, slots=True)
class Request:
    """A sentence and the arguments of its request."""

    sentence: Sentence
    arguments: Arguments

    @property
    def nbytes(self) -> int:
        """Bytes of the chunks in addition to the model's inputs."""
        return sum([chunk.nbytes for chunk in self.sentence.chunks])


class TokenClassifier(TextEncoder):
    """token-classification: entities of a text."""

    cut_hint = (
        "pass stride and an aggregation_strategy to have it read in pieces, or set the tokenizer's model_max_length"
    )

    def encode(self, values: Sequence[Any], arguments: Arguments) -> Sequence[Any]:
        """A Sentence for each text. Raises ItemError (bad_input, bad_parameter)."""
        pre = arguments.fresh().preprocess
        words, delimiter = pre["is_split_into_words"], pre.get("delimiter", " ")
        if any(isinstance(value, list) != words for value in values):
            kind = "lists of words" if words else "texts; pass is_split_into_words=true with lists of words"
            raise ItemError("bad_input", f"token-classification takes {kind}", STAGE)
        tokenizer = self.copies.get().tokenizer
        keywords = self._keywords(tokenizer, pre)
        for value in values if keywords.get("return_overflowing_tokens") else ():
            self._require_few(tokenizer, value, keywords)
        encoded = tokenizer(list(values), **keywords)
        chunks: list[list[Chunk]] = [[] for _ in values]
        owners = encoded.pop("overflow_to_sample_mapping", range(len(values)))
        for row, owner in enumerate(owners):
            chunks[owner].append(_chunk(encoded, row, words=words))
        texts = [delimiter.join(value) for value in values] if words else list(values)
        spans = [_spans(value, len(delimiter)) for value in values] if words else [None] * len(values)
        return [Sentence(*parts) for parts in zip(texts, chunks, spans, strict=True)]

    def keywords(self, arguments: Arguments) -> dict[str, Any]:
        """The tokenizer's arguments."""
        return self._keywords(self.copies.get().tokenizer, arguments.fresh().preprocess)

    def units(self, decoded: Decoded, arguments: Arguments, encoded: Any) -> list[Unit]:
        """A unit for each chunk."""
        assembly = Assembly(decoded.work, expected=len(encoded.chunks), context=Request(encoded, arguments))
        return [self.unit(assembly, index, chunk.features, arguments) for index, chunk in enumerate(encoded.chunks)]

    def split(self, outputs: Any, units: Sequence[Unit]) -> list[Any]:
        """The logits of each unit's own tokens, `[tokens, labels]`."""
        logits = outputs["logits"].float().cpu()
        return [logits[row, self.span(unit, logits.shape[1])] for row, unit in enumerate(units)]

    def finish(self, assembly: Assembly) -> Any:
        """`[{entity, score, index, word, start, end}]`, or `[{entity_group, …}]` with an aggregation strategy."""
        request: Request = assembly.context
        sentence, post = request.sentence, request.arguments.fresh().postprocess
        rows = [
            self._row(sentence, chunk, assembly.outputs[index], post) for index, chunk in enumerate(sentence.chunks)
        ]
        entities = self.copies.get().postprocess(rows, **post)
        return [{**entity, "score": float(entity["score"])} for entity in entities]

    def _row(self, sentence: Sentence, chunk: Chunk, logits: torch.Tensor, post: Mapping[str, Any]) -> dict[str, Any]:
        """A chunk in the form for the pipeline's postprocess."""
        special = chunk.special
        if post.get("aggregation_strategy", AggregationStrategy.NONE) == AggregationStrategy.NONE:
            # Most tokens of a text are left out in the end, so postprocess need not look at them.
            special = special | self._ignored(logits.numpy(), post.get("ignore_labels"))
        return {
            "logits": logits[None],
            "input_ids": [chunk.features["input_ids"].tolist()],
            "special_tokens_mask": torch.from_numpy(special)[None],
            "offset_mapping": None if chunk.offsets is None else [chunk.offsets.tolist()],
            "sentence": sentence.text,
            "word_ids": None if chunk.words is None else [None if one < 0 else one for one in chunk.words.tolist()],
            "word_to_chars_map": sentence.spans,
        }

    def _ignored(self, logits: np.ndarray[Any, Any], labels: Sequence[str] | None) -> np.ndarray[Any, Any]:
        """For each token whether its label is one of `labels`; `O` by default."""
        wanted = ["O"] if labels is None else labels
        ignored = [index for index, label in self.pipe.model.config.id2label.items() if label in wanted]
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        return np.isin((scores / scores.sum(-1, keepdims=True)).argmax(-1), ignored)

    def _require_few(self, tokenizer: Any, value: Any, keywords: Mapping[str, Any]) -> None:
        """Raise ItemError (too_long) for a text that would be read in too many pieces."""
        longest = keywords.get("max_length") or tokenizer.model_max_length
        require_few_pieces(
            tokenizer,
            value,
            room=longest - tokenizer.num_special_tokens_to_add(),
            stride=keywords.get("stride", 0),
            longest=longest,
            most=self.max_whole_characters,
            is_split_into_words=isinstance(value, list),
        )

    def _keywords(self, tokenizer: Any, pre: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in pre.get("tokenizer_params", {}).items() if name != "padding"}
        longest, words = tokenizer.model_max_length, pre["is_split_into_words"]
        room = longest - tokenizer.num_special_tokens_to_add()
        if given.get("stride", 0) >= room:  # the tokenizer would panic instead of raising an exception
            text = f"stride is {given['stride']}, but a chunk has room for {room} tokens; pass a smaller one"
            raise ItemError("bad_parameter", text, STAGE)
        if words and not tokenizer.is_fast:
            raise ItemError("bad_parameter", "is_split_into_words needs a model with a fast tokenizer", STAGE)
        return {
            "truncation": bool(longest and longest > 0),
            "return_special_tokens_mask": True,
            "return_offsets_mapping": tokenizer.is_fast,
            "is_split_into_words": words,
            **given,
        }


def _chunk(encoded: Any, row: int, *, words: bool) -> Chunk:
    """One row of an encoding as arrays: lists take a dozen times as much memory, and a long text has thousands of chunks."""
    offsets = np.asarray(encoded["offset_mapping"][row], np.int32) if "offset_mapping" in encoded else None
    own = [-1 if one is None else one for one in encoded.word_ids(row)] if words else None
    return Chunk(
        {name: np.asarray(encoded[name][row], np.int32) for name in encoded if name not in _OF_A_CHUNK},
        np.asarray(encoded["special_tokens_mask"][row], np.int64),
        offsets,
        None if own is None else np.asarray(own, np.int32),
    )


def _spans(words: Sequence[str], delimiter: int) -> list[tuple[int, int]]:
    """First and last character of each word, with `delimiter` characters between two words."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + delimiter
    return spans
